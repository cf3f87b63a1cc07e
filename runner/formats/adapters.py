"""LoRA files: Kohya's and diffusers/PEFT's naming, read and written with true alpha; every key is accounted for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runner.errors import Invalid
from runner.families.spec import Target
from runner.formats.adapter_names import DOWN, UP, check_adapter_file, find_adapters, naming_of
from runner.formats.headers import read_header
from runner.formats.tensors import read_tensors

ADAPTER_METADATA = "lora_adapter_metadata"
"""The key under which diffusers looks for rank and alpha; without it a file is loaded with alpha = rank."""


def read_adapters(file: Path, targets: Sequence[Target]) -> dict[str, Tensor]:
    """`component.layer.lora_A|lora_B` in fp32, scaled so that under our alpha they do what the file says.

    Raises `Invalid` where a layer is missing, unknown or of another size.
    """
    header = read_header(file)
    problem = check_adapter_file(header, targets)
    if problem is not None:
        raise Invalid(f"{file} does not fit: {problem}")
    keys = list(header.tensors)
    naming = naming_of(keys)
    assert naming is not None
    found, _, _ = find_adapters(keys, targets)
    tensors = read_tensors(file, {key: key for key in keys}, None)
    settings = _peft_settings(header.metadata)
    result: dict[str, Tensor] = {}
    for target in targets:
        name = f"{target.component}.{target.name}"
        entry = found[name]
        down, up = tensors[entry.down].float(), tensors[entry.up].float()
        if entry.alpha is not None:
            alpha = float(tensors[entry.alpha].float())
        else:
            alpha = _peft_alpha(settings, target)
        result[f"{name}.lora_A"] = _shaped(down, target.rank, target, first=True)
        result[f"{name}.lora_B"] = _shaped(up * (alpha / target.alpha), target.rank, target, first=False)
    return result


@dataclass(frozen=True)
class Lora:
    """The layers of a LoRA file that are to be merged, and their tensors as `networks.lora` takes them."""

    targets: list[Target]
    state: dict[str, Tensor]


def read_lora(
    file: Path, layers: Sequence[Target], multiplier: float, include: Sequence[str], exclude: Sequence[str]
) -> Lora:
    """A file with adapters of any of a model's layers, of any ranks. `include` and `exclude` are regular expressions
    on names such as `unet.down_blocks.0.attentions.0.proj_in`. Raises `Invalid` where a layer is not the model's."""
    shapes = read_header(file).tensors
    found, _, _ = find_adapters(list(shapes), layers)
    targets: list[Target] = []
    for layer in layers:
        keys = found.get(f"{layer.component}.{layer.name}")
        if keys is not None:
            rank = (shapes[keys.down][1] or (0,))[0]
            targets.append(replace(layer, rank=rank, alpha=float(rank)))
    state = read_adapters(file, targets)
    chosen = [
        target
        for target in targets
        if (not include or any(re.search(pattern, target.diffusers) for pattern in include))
        and not any(re.search(pattern, target.diffusers) for pattern in exclude)
    ]
    if not chosen:
        raise Invalid(
            f"--include and --exclude leave none of the {len(targets)} layers of {file}",
            hint=f"they are looked for in names such as {targets[0].diffusers}",
        )
    for target in chosen:
        state[f"{target.component}.{target.name}.lora_B"] *= multiplier
    return Lora(chosen, state)


def _shaped(tensor: Tensor, rank: int, target: Target, first: bool) -> Tensor:
    """In the shape of our module: a 1x1 convolution's factors may come as matrices and the other way round."""
    rows, columns = (rank, target.inputs) if first else (target.outputs, rank)
    kernel = target.kernel if first else 1
    return tensor.reshape((rows, columns, kernel, kernel) if target.kind == "conv" else (rows, columns))


def _peft_settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    """diffusers' adapter metadata; empty where there is none."""
    try:
        content = json.loads(metadata.get(ADAPTER_METADATA, "{}"))
    except json.JSONDecodeError:
        return {}
    return content if isinstance(content, dict) else {}


def _peft_alpha(content: Mapping[str, Any], target: Target) -> float:
    """The alpha that peft would give this layer by such metadata; without one, its rank."""
    root, _, name = target.diffusers.partition(".")
    patterns = content.get(f"{root}.alpha_pattern")
    alpha = content.get(f"{root}.lora_alpha")
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if name == pattern or name.endswith(f".{pattern}"):
            alpha = value
    if not isinstance(alpha, (int, float)):
        return float(target.rank)
    return float(alpha) * (target.rank**0.5 if content.get(f"{root}.use_rslora") else 1.0)


def kohya_state(targets: Sequence[Target], state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Kohya's keys: down, up and the true alpha of each layer."""
    found: dict[str, Tensor] = {}
    for target in targets:
        name = f"{target.component}.{target.name}"
        found[target.kohya + DOWN["kohya"]] = state[f"{name}.lora_A"].to(dtype)
        found[target.kohya + UP["kohya"]] = state[f"{name}.lora_B"].to(dtype)
        found[target.kohya + ".alpha"] = torch.tensor(target.alpha, dtype=dtype)
    return found


def diffusers_state(
    targets: Sequence[Target], state: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """diffusers' keys, and the metadata without which a reader would take alpha = rank."""
    found: dict[str, Tensor] = {}
    for target in targets:
        name = f"{target.component}.{target.name}"
        found[target.diffusers + DOWN["diffusers"]] = state[f"{name}.lora_A"].to(dtype)
        found[target.diffusers + UP["diffusers"]] = state[f"{name}.lora_B"].to(dtype)
    return found, {"format": "pt", ADAPTER_METADATA: json.dumps(_adapter_metadata(targets), sort_keys=True)}


def _adapter_metadata(targets: Sequence[Target]) -> dict[str, object]:
    content: dict[str, object] = {}
    for component in dict.fromkeys(target.component for target in targets):
        own = [target for target in targets if target.component == component]
        root = own[0].diffusers.partition(".")[0]
        # Without the text encoder's outer name, which transformers 5 no longer has; peft matches by the names' ends.
        names = {target.diffusers.removeprefix(f"{root}.").removeprefix("text_model."): target for target in own}
        rank, alpha = own[0].rank, own[0].alpha
        content |= {
            f"{root}.r": rank,
            f"{root}.lora_alpha": alpha,
            f"{root}.target_modules": list(names),
            f"{root}.rank_pattern": {name: target.rank for name, target in names.items() if target.rank != rank},
            f"{root}.alpha_pattern": {name: target.alpha for name, target in names.items() if target.alpha != alpha},
            f"{root}.bias": "none",
            f"{root}.peft_type": "LORA",
            f"{root}.lora_dropout": 0.0,
            f"{root}.use_dora": False,
            f"{root}.use_rslora": False,
        }
    return content
