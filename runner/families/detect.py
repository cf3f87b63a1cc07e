"""Which family a checkpoint is of, from its header or its model_index.json; torch-free."""

from __future__ import annotations

from pathlib import Path

from runner.errors import Invalid
from runner.families.identify import identify
from runner.families.locate import locate_model
from runner.families.parts.files import BUILTIN, CHECKPOINT, read_json
from runner.families.registry import family_spec, installed
from runner.model.model import ModelProblem
from runner.weights.headers import read_header


def detect(model: str) -> tuple[str, Path]:
    """(family, file or folder) of a model, from its header or its model_index.json. Raises `Invalid`."""
    try:
        place = locate_model(model, Path.cwd(), None, BUILTIN, CHECKPOINT)
        if place.is_dir():
            index = place / "model_index.json"
            kind = (
                str(read_json(index).get("_class_name", "")) if index.is_file() else "a folder without model_index.json"
            )
            words = f"a {kind}"
            family = next((name for name in installed() if kind in family_spec(name).pipelines), None)
        else:
            found = identify(read_header(place).tensors)
            words, family = (found.words, found.family) if found else ("of no known kind", None)
    except ModelProblem as problem:
        raise Invalid(str(problem), hint=problem.hint) from None
    if family is None:
        raise Invalid(f"{place} is {words}", hint=f"families are {', '.join(installed())}")
    recipe = family_spec(family).first_recipe
    if recipe:
        raise Invalid(
            f"{place} is {words}, and such models come in several files",
            hint=f"start from a recipe: runner copy {recipe} run.toml",
        )
    return family, place
