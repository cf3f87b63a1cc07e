"""Writes whole models: a directory in diffusers' layout, or one file in the original (LDM) layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from runner.families.sd.architecture import renames
from runner.families.sd.spec import FOLDERS, SHIPPED, component_layers
from runner.families.spec import Model
from runner.formats.tensors import write_tensors

_PREFIXES = {
    "denoiser": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder_1": "cond_stage_model.transformer.",
}
_FILES = {
    "denoiser": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder_1": "model.safetensors",
}
_CLASSES = {"denoiser": "UNet2DConditionModel", "vae": "AutoencoderKL"}


def save_pipeline(
    folder: Path, model: Model, modules: Mapping[str, Mapping[str, Tensor]], prediction_type: str
) -> None:
    """A diffusers directory: `modules` is component → state dict in diffusers' names."""
    from runner.families.sd.text import load_tokenizer

    for name, state in modules.items():
        sub = folder / FOLDERS[name]
        sub.mkdir(parents=True, exist_ok=True)
        config = dict(model.components[name].config)
        if name in _CLASSES:
            config["_class_name"] = _CLASSES[name]
        else:
            config.update(model_type="clip_text_model", architectures=["CLIPTextModel"])
        _write_json(
            sub / "config.json", {key: value for key, value in config.items() if not key.startswith("_name_or")}
        )
        if name == "text_encoder_1":  # files use the names of transformers 4, which every reader knows
            state = {f"text_model.{key}": tensor for key, tensor in state.items()}
        write_tensors(sub / _FILES[name], state, {"format": "pt"})
    load_tokenizer(model).save_pretrained(folder / "tokenizer")
    scheduler = {**model.scheduler, "prediction_type": prediction_type}
    (folder / "scheduler").mkdir(exist_ok=True)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    shutil.copyfile(SHIPPED / "model_index.json", folder / "model_index.json")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", scheduler.get("_class_name", "PNDMScheduler")]
    _write_json(folder / "model_index.json", index)


def original_state(model: Model, modules: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The state dict of one file in the original layout."""
    found: dict[str, Tensor] = {}
    for name, state in modules.items():
        found.update(original_component(model, name, state, _PREFIXES[name]))
    return found


def denoiser_file(model: Model, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The denoiser alone with its original names, as ComfyUI's loader of diffusion models reads it."""
    return original_component(model, "denoiser", state, "")


def original_component(model: Model, name: str, state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """One component's state dict with its original names behind `prefix`."""
    layers = component_layers(model.components[name])
    as_convolution = {f"{layer.name}.weight" for layer in layers if layer.original_is_conv}
    return {
        original: state[ours][..., None, None] if ours in as_convolution else state[ours]
        for original, ours in renames(layers, prefix).items()
    }


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(dict(content), indent=2, sort_keys=True) + "\n", encoding="utf-8")
