"""runner recipes, runner copy."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

import click

from runner.cli import out
from runner.errors import UsageError

_LEFT_OUT = ("run.toml", ".runner", "runs", "published", "*.lock", "__pycache__")
"""Of a recipe's folder: what is written anew, and what an apply there left."""


def all_recipes() -> Iterator[tuple[str, Path]]:
    """(name, folder) of each recipe."""
    from runner.shipped import shipped

    for folder in sorted(shipped("recipes").iterdir()):
        if (folder / "run.toml").is_file():
            yield folder.name, folder


def first_line(file: Path) -> str:
    """A recipe's own description: the first comment of its run.toml that is no editor's line."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and not line.startswith("#:"):
            return line.lstrip("# ").rstrip(".")
    return ""


@click.command()
def command() -> None:
    """List the recipes, one line each."""
    recipes = list(all_recipes())
    width = max(len(name) for name, _ in recipes)
    for name, folder in recipes:
        out.data(f"{name:<{width}}  {first_line(folder / 'run.toml')}")


@click.command()
@click.argument("recipe")
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set a key in the copy; its comments are kept."
)
def copy(recipe: str, destination: Path, settings: tuple[str, ...]) -> None:
    """Copy RECIPE to the folder DESTINATION, which must not hold a run.toml yet."""
    recipes = dict(all_recipes())
    if destination.suffix.lower() == ".toml" and not destination.is_dir():
        parent = destination.parent
        folder = parent if parent != Path(".") and not (parent / "run.toml").exists() else parent / recipe
        raise UsageError(
            f"DESTINATION is a folder, and {destination} is the name of a file",
            hint=f"type `runner copy {recipe} {folder}`: it makes {folder / 'run.toml'} and what stands beside it",
        )
    if recipe not in recipes:
        near = difflib.get_close_matches(recipe, recipes, 1)
        hint = f"did you mean {near[0]}?" if near else f"recipes are {', '.join(recipes)}"
        raise UsageError(f"there is no recipe {recipe!r}", hint=hint)
    taken = [item.name for item in recipes[recipe].iterdir() if (destination / item.name).exists()]
    if destination.is_file() or taken:
        what = f"it holds {', '.join(sorted(taken)[:3])}" if taken else "it is a file"
        raise UsageError(f"{destination} is not overwritten: {what}", hint="name another folder")
    text = (recipes[recipe] / "run.toml").read_text(encoding="utf-8")
    changed = _with_settings(text, settings)
    _write(recipes[recipe], destination, changed)
    out.data(str(destination / "run.toml"))


def _write(recipe: Path, destination: Path, text: str) -> None:
    """A folder that is there whole or not at all; into one that is there already, the run.toml comes last."""
    from runner.atomic import copy_tree, new_folder, sweep, write_text
    from runner.cli.schema import schema_text

    def fill(folder: Path) -> None:
        copy_tree(recipe, folder, _LEFT_OUT)
        write_text(folder / "run.schema.json", schema_text())
        write_text(folder / "run.toml", text)

    if destination.is_dir():
        fill(destination)
    else:
        sweep(destination.parent, destination.name)
        with new_folder(destination) as staged:
            fill(staged)


def _with_settings(text: str, settings: tuple[str, ...]) -> str:
    """The TOML text with keys set and its comments kept; the result must be a valid configuration."""
    import json

    import tomlkit
    from pydantic import ValidationError

    from runner.config.overrides import apply_overrides
    from runner.config.schema import everything

    document = tomlkit.parse(text)
    apply_overrides(document, settings)
    try:
        everything().model_validate_json(json.dumps(document.unwrap()), strict=True)
    except ValidationError as error:
        detail = error.errors()[0]
        name = ".".join(str(part) for part in detail["loc"])
        raise UsageError(f"--set {name}: {detail['msg']}", hint=f"runner explain {name}") from None
    return tomlkit.dumps(document)
