"""Writes whole models: a directory in diffusers' layout, or one file in the original layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runner.families.parts.checkpoint import Finder
from runner.families.parts.match import layers_of
from runner.families.parts.part import Naming, Part
from runner.model.layers import Layer
from runner.model.model import Model
from runner.weights.tensors import write_tensors

States = Mapping[str, Mapping[str, Tensor]]
"""Component → state dict in diffusers' names."""


def save_pipeline(
    finder: Finder,
    tokenizers: Mapping[str, Any],
    folder: Path,
    model: Model,
    modules: States,
    prediction_type: str,
    zero_terminal_snr: bool,
) -> None:
    """A diffusers directory."""
    parts = {part.name: part for part in finder.parts}
    for name, state in modules.items():
        part, sub = parts[name], folder / parts[name].folder
        sub.mkdir(parents=True, exist_ok=True)
        config = dict(model.components[name].config)
        kind, file = part.module, "diffusion_pytorch_model.safetensors"
        if kind.model_type is not None:
            config.update(model_type=kind.model_type, architectures=[kind.name])
            file = "model.safetensors"
        else:
            config["_class_name"] = kind.name
        _write_json(
            sub / "config.json", {key: value for key, value in config.items() if not key.startswith("_name_or")}
        )
        state = {kind.outer + key: tensor for key, tensor in state.items() if key not in kind.tied}
        write_tensors(sub / file, state, {"format": "pt"})
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(folder / parts[name].folder.replace("text_encoder", "tokenizer"))
    scheduler = dict(model.scheduler)
    if prediction_type in ("epsilon", "v_prediction"):
        scheduler["prediction_type"] = prediction_type
        if zero_terminal_snr:
            scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        else:
            scheduler.pop("rescale_betas_zero_snr", None)
    (folder / "scheduler").mkdir(exist_ok=True)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = json.loads((finder.shipped / "model_index.json").read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", scheduler.get("_class_name", index["scheduler"][1])]
    if model.pipeline:
        index["_class_name"] = model.pipeline
    for part in finder.parts:
        library = "diffusers" if part.module.model_type is None else "transformers"
        index.setdefault(part.folder, [library, part.module.name])
        if part.name not in modules:
            index[part.folder] = index[part.folder.replace("text_encoder", "tokenizer")] = [None, None]
    _write_json(folder / "model_index.json", index)


def single_file(finder: Finder, model: Model, modules: States) -> dict[str, Tensor]:
    """The state dict of one file in the original layout."""
    found: dict[str, Tensor] = {}
    for part in finder.parts:
        if part.name in modules and part.saved is not None:
            found |= original_component(part, model, modules[part.name], part.saved)
    return found


def original_component(part: Part, model: Model, state: Mapping[str, Tensor], naming: Naming) -> dict[str, Tensor]:
    """One component's state dict with its original names."""
    layers = (
        naming.layers(model.components[part.name].config)
        if naming.layers
        else layers_of(part, model.components[part.name])
    )
    fused: dict[str, list[tuple[Layer, str]]] = {}
    for layer in layers:
        for parameter, _ in layer.parameters():
            fused.setdefault(layer.origin(parameter, naming.prefix).key, []).append((layer, parameter))
    found: dict[str, Tensor] = {}
    for key, entries in fused.items():
        rows = [state[layer.key(parameter)] for layer, parameter in sorted(entries, key=lambda entry: entry[0].part)]
        tensor = torch.cat(rows) if len(rows) > 1 else rows[0]
        layer, parameter = entries[0]
        if layer.swapped:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        if layer.transposed:
            tensor = tensor.T.contiguous()
        if layer.original_is_conv and parameter == "weight":
            tensor = tensor[..., None, None]
        found[key] = tensor
    return found


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(dict(content), indent=2, sort_keys=True) + "\n", encoding="utf-8")
