"""Which family a checkpoint is of, from its header or its model_index.json; torch-free."""

from __future__ import annotations

from pathlib import Path

from runner.errors import Invalid
from runner.families.locate import locate_model
from runner.families.parts.files import BUILTIN, CHECKPOINT, read_json
from runner.families.parts.identify import identify
from runner.families.registry import FAMILIES
from runner.model.model import ModelProblem
from runner.weights.headers import read_header

_INDEXES = {
    "StableDiffusionPipeline": "sd15",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux1",
    "FluxKontextPipeline": "flux1",
    "ChromaPipeline": "chroma",
    "HunyuanVideoPipeline": "hunyuan_video",
    "HunyuanVideoFramepackPipeline": "framepack",
}
_IN_SEVERAL_FILES = {"hunyuan_video": "hunyuan-video-lora", "framepack": "framepack-lora"}


def detect(model: str) -> tuple[str, Path]:
    """(family, file or folder) of a model, from its header or its model_index.json. Raises `Invalid`."""
    try:
        place = locate_model(model, Path.cwd(), None, BUILTIN, CHECKPOINT)
        if place.is_dir():
            index = place / "model_index.json"
            kind = (
                str(read_json(index).get("_class_name", "")) if index.is_file() else "a folder without model_index.json"
            )
            words, family = f"a {kind}", _INDEXES.get(kind)
        else:
            found = identify(read_header(place).tensors)
            words, family = (found.words, found.family) if found else ("of no known kind", None)
    except ModelProblem as problem:
        raise Invalid(str(problem), hint=problem.hint) from None
    if family is None:
        raise Invalid(f"{place} is {words}", hint=f"families are {', '.join(FAMILIES)}")
    if family in _IN_SEVERAL_FILES:
        raise Invalid(
            f"{place} is {words}, and video models come in several files",
            hint=f"start from a recipe: runner copy {_IN_SEVERAL_FILES[family]} run.toml",
        )
    return family, place
