"""Reads adapter files: Kohya's, LyCORIS' and diffusers/peft's naming, with true alpha; every key is accounted for."""

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
from runner.formats.adapter_names import ADAPTER_METADATA, Entry, check_adapter_file, parse
from runner.formats.headers import read_header
from runner.formats.tensors import read_tensors
from runner.networks.merge import halves_swapped
from runner.networks.shapes import adapter_shapes

_SCALED = {"lora": "lora_B", "dora": "lora_B", "loha": "hada_w1_a", "lokr": "lokr_w1"}
"""The factor that takes a change of the scale."""


@dataclass(frozen=True)
class Lora:
    """The layers of a file that are to be merged, and their tensors as `networks.merge` takes them."""

    targets: list[Target]
    state: dict[str, Tensor]


def read_adapters(file: Path, targets: Sequence[Target], decompose_factor: int = -1) -> dict[str, Tensor]:
    """A run's parameters from a file, in fp32, scaled so that under our alpha they do what the file says.

    Raises `Invalid` where a layer is missing, unknown, of another size or kind.
    """
    problem = check_adapter_file(read_header(file), targets, decompose_factor)
    if problem is not None:
        raise Invalid(f"{file} does not fit: {problem}")
    found = {target.full_name: (target, tensors) for target, tensors in _read(file, targets)}
    result: dict[str, Tensor] = {}
    owners: dict[str, str] = {}
    for target in targets:
        own, tensors = found[target.full_name]
        for name, shape in adapter_shapes(target, decompose_factor).items():
            tensor = tensors[name]
            if name == _SCALED.get(target.adapter):
                tensor = tensor * (own.scale / target.scale)
            if target.tied and name == "lora_A":
                owner = owners.setdefault(target.kohya, target.full_name)
                if owner != target.full_name:
                    if not torch.equal(tensor.reshape(shape), result[f"{owner}.lora_A"]):
                        raise Invalid(
                            f"{file} has a first factor of its own for each of q, k and v of {target.kohya}",
                            hint='set network.targets = "attention", whose layers do not share it',
                        )
                    continue
            result[f"{target.full_name}.{name}"] = tensor.reshape(shape)
    return result


def read_lora(
    file: Path, layers: Sequence[Target], multiplier: float, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Lora:
    """A file with adapters of any of a model's layers, of any kinds and ranks. `include` and `exclude` are regular
    expressions on names such as `unet.down_blocks.0.attentions.0.proj_in`. Raises `Invalid` where a layer is not the
    model's."""
    header = read_header(file)
    parsed = parse(header.tensors, layers)
    unknown = [*parsed.modules, *parsed.keys]
    if not parsed.entries:
        raise Invalid(f"{file} does not fit: {check_adapter_file(header, layers)}")
    if unknown:
        listed = ", ".join(unknown[:3]) + (", …" if len(unknown) > 3 else "")
        raise Invalid(f"{file} does not fit: {len(unknown)} of its layers or tensors are not known here ({listed})")
    everything = _read(file, layers)
    chosen = [
        (target, tensors)
        for target, tensors in everything
        if (not include or any(re.search(pattern, target.diffusers) for pattern in include))
        and not any(re.search(pattern, target.diffusers) for pattern in exclude)
    ]
    if not chosen:
        raise Invalid(
            f"--include and --exclude leave none of the {len(everything)} layers of {file}",
            hint=f"they are looked for in names such as {everything[0][0].diffusers}",
        )
    state: dict[str, Tensor] = {}
    for target, tensors in chosen:
        if multiplier != 1 and target.adapter not in ("lora", "loha", "lokr"):
            raise Invalid(f"{file} is of kind {target.adapter}, which has no multiplier", hint="leave :MULTIPLIER out")
        if multiplier != 1:
            tensors[_SCALED[target.adapter]] = tensors[_SCALED[target.adapter]] * multiplier
        state |= {f"{target.full_name}.{name}": tensor for name, tensor in tensors.items()}
    return Lora([target for target, _ in chosen], state)


def _read(file: Path, layers: Sequence[Target]) -> list[tuple[Target, dict[str, Tensor]]]:
    """Each layer with the kind, rank and alpha that the file says, and its tensors in fp32."""
    header = read_header(file)
    parsed = parse(header.tensors, layers)
    raw = read_tensors(file, {key: key for key in header.tensors}, None)
    return [
        _layer(file, entry, {name: raw[key].float() for name, key in entry.keys.items()}, header.metadata)
        for entry in parsed.entries.values()
    ]


def _layer(
    file: Path, entry: Entry, tensors: dict[str, Tensor], metadata: Mapping[str, str]
) -> tuple[Target, dict[str, Tensor]]:
    target, kind = entry.target, entry.kind
    if kind == "diff" or any(name.endswith(("_t1", "_t2")) or name == "lokr_w1_a" for name in tensors):
        raise Invalid(f"{file}: {entry.module} is of a kind that is not read here ({', '.join(sorted(tensors))})")
    alpha = tensors.pop("alpha", None)
    rank = _rank(kind, tensors)
    if alpha is not None:
        scale = float(alpha) / rank if rank else 1.0
        if kind == "lokr" and "lokr_w2" in tensors and entry.module == target.kohya:
            scale = 1.0  # without a low rank LyCORIS and ComfyUI leave alpha aside
    else:
        settings = _json_of(metadata, ADAPTER_METADATA)
        rank = rank or _peft_setting(settings, target, "r", "rank_pattern")
        scale = _peft_alpha(settings, target, rank) / rank if rank else 1.0
    rank = rank or target.rank
    if (entry.fused or (target.swapped and entry.module == target.kohya)) and kind in ("lora", "dora"):
        split = ("runner.version" not in metadata and scale != 1.0) or "split_qkv" in metadata.get(
            "ss_network_args", ""
        )
        tensors, rank, scale = _unfused(target, tensors, rank, scale, split)
    return replace(target, adapter=kind, rank=rank, alpha=scale * rank, tied=False), tensors


def _rank(kind: str, tensors: Mapping[str, Tensor]) -> int:
    """The rank that a file's tensors have; 0 where they have none."""
    name = {"lora": "lora_A", "dora": "lora_A", "loha": "hada_w1_b", "lokr": "lokr_w2_b"}.get(kind, "")
    return int(tensors[name].shape[0]) if name in tensors else 0


def _unfused(
    target: Target, tensors: dict[str, Tensor], rank: int, scale: float, split: bool
) -> tuple[dict[str, Tensor], int, float]:
    """One layer's share of a module whose rows are several layers'. `split`: where each part has a first factor of its
    own, alpha is meant for the rank of one part (Kohya's split_qkv), not for that of the whole tensor."""
    up = tensors["lora_B"][target.rows]
    down = tensors["lora_A"]
    found = dict(tensors)
    used = up.flatten(1).any(dim=0).nonzero().flatten().tolist()
    width = used[-1] - used[0] + 1 if used else rank
    if width < rank and rank % width == 0 and used[0] % width == 0:  # each part has a first factor of its own
        own = slice(used[0], used[-1] + 1)
        up, down = up[:, own], down[own]
        scale, rank = (scale * (rank // width) if split else scale), width
    found |= {"lora_A": down, "lora_B": halves_swapped(up) if target.swapped else up}
    if "lora_magnitude_vector" in found:
        magnitude = found["lora_magnitude_vector"].reshape(-1)[target.rows]
        found["lora_magnitude_vector"] = halves_swapped(magnitude) if target.swapped else magnitude
    return found, rank, scale


def _json_of(metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    """A table in a file's metadata; empty where there is none."""
    try:
        content = json.loads(metadata.get(name, "{}"))
    except json.JSONDecodeError:
        return {}
    return content if isinstance(content, dict) else {}


def _peft_alpha(content: Mapping[str, Any], target: Target, rank: int) -> float:
    """The alpha that peft would give this layer by such metadata; without one, its rank."""
    root = target.diffusers.partition(".")[0]
    name = "lora_alpha" if f"{root}.lora_alpha" in content else "alpha"
    alpha = _peft_setting(content, target, name, "alpha_pattern")
    return (alpha or float(rank)) * (rank**0.5 if content.get(f"{root}.use_rslora") else 1.0)


def _peft_setting(content: Mapping[str, Any], target: Target, name: str, patterns: str) -> Any:
    """A layer's number by peft's rules: of the pattern that its name ends with, else the general one; 0 without any."""
    root, _, layer = target.diffusers.partition(".")
    value, own = content.get(f"{root}.{name}"), content.get(f"{root}.{patterns}")
    for pattern, number in own.items() if isinstance(own, dict) else ():
        if layer == pattern or layer.endswith(f".{pattern}"):
            value = number
    return value if isinstance(value, (int, float)) else 0
