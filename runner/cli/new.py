"""runner new: from a model and a folder of pictures to a short run.toml."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from runner.cli import out
from runner.cli.common import memory_size, settings_option
from runner.errors import UsageError


@click.command()
@click.option("--model", required=True, help="A checkpoint: a .safetensors or .ckpt file, or a diffusers directory.")
@click.option("--images", required=True, type=click.Path(path_type=Path), help="A folder of pictures (with captions).")
@click.option(
    "--memory",
    metavar="SIZE",
    help="The GPU's memory, e.g. 12GB: settings that fit into it are chosen. Unset: this machine's GPU, where there is one.",
)
@click.option("--method", type=click.Choice(("lora", "full")), help="An adapter, or the whole denoiser.")
@click.option("--class-tokens", help="Caption of pictures that have no caption file.")
@click.option("--name", help="Name of the run; else the folder's.")
@click.option("--out", "target", type=click.Path(path_type=Path), default=Path("run.toml"), help="The file to write.")
@settings_option
def command(
    model: str,
    images: Path,
    memory: str | None,
    method: str | None,
    class_tokens: str | None,
    name: str | None,
    target: Path,
    settings: tuple[str, ...],
) -> None:
    """Write a short run.toml for MODEL and IMAGES, with settings that fit into this machine's GPU or into --memory. On a
    terminal it asks for what is not given; elsewhere it asks nothing."""
    from runner.atomic import write_text
    from runner.cli.schema import schema_text
    from runner.plan.propose import SCHEMA, Wishes, propose, uncaptioned

    if target.exists():
        raise UsageError(f"{target} is there and is not overwritten", hint="name another file with --out")
    limit = None if memory is None else memory_size("--memory", memory)
    asks = sys.stdin.isatty() and sys.stderr.isatty()
    if asks:
        name, method, limit = _asked(images, name, method, limit)
    elif limit is None:
        limit = _found_memory()
    without = uncaptioned(images)
    if without and class_tokens is None and asks:
        noun = "picture has" if without == 1 else "pictures have"
        class_tokens = click.prompt(f"{without} {noun} no caption. Their caption?", default="", err=True) or None
    proposal = propose(
        Wishes(
            model=model,
            images=images,
            method=method or "lora",
            class_tokens=class_tokens,
            name=name,
            memory=limit,
            settings=settings,
        ),
        target,
    )
    schema = target.parent / SCHEMA
    if not schema.exists():
        write_text(schema, schema_text())
    write_text(target, proposal.text)
    for note in proposal.notes:
        out.say(note)
    out.data(str(target))


def _found_memory() -> int | None:
    """The memory of this machine's first GPU, and says so; None where there is none."""
    from runner.plan.device import cards
    from runner.plan.render import size_text

    found = cards()
    if not found:
        return None
    out.say(f"this machine's GPU: {found[0].name}, {size_text(found[0].memory)}")
    return found[0].memory


def _asked(images: Path, name: str | None, method: str | None, limit: int | None) -> tuple[str, str, int | None]:
    """Name, method and memory, as typed on the terminal where they are not given."""
    from runner.plan.propose import default_name

    if name is None:
        name = click.prompt("Name of the run", default=default_name(images), value_proc=_typed_name, err=True)
    if method is None:
        method = click.prompt(
            "Train an adapter (lora) or the whole model (full)?",
            default="lora",
            type=click.Choice(("lora", "full")),
            err=True,
        )
    if limit is None:
        limit = _found_memory()
    if limit is None:
        words = "Memory of the GPU that will train, e.g. 12GB (empty: leave it open)"
        limit = click.prompt(words, default="", value_proc=_typed_memory, err=True)
    return name, method, limit


def _typed_memory(text: str) -> int | None:
    """Click asks again where this raises its own error."""
    from runner.plan.fit import parse_memory

    size = parse_memory(text)
    if text.strip() and size is None:
        raise click.UsageError("write it as 12GB, from 1GB to 1TB")
    return size


def _typed_name(text: str) -> str:
    from pydantic import ValidationError

    from schemas.run import Run

    try:
        return Run(name=text).name
    except ValidationError:
        raise click.UsageError("letters, digits, and . _ - between them, 100 at most") from None
