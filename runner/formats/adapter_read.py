"""Reads adapter files: Kohya's, LyCORIS' and diffusers/peft's naming, with true alpha; every key is accounted for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runner.errors import Invalid
from runner.formats.adapter_fit import check_mergeable, kind_of, some
from runner.formats.adapter_modules import columns_of
from runner.formats.adapter_names import ADAPTER_METADATA, SCALED, Module, parse
from runner.formats.adapter_start import check_adapter_file
from runner.model.targets import Target
from runner.networks.merge import Change, halves_swapped
from runner.networks.shapes import adapter_shapes
from runner.patterns import Search
from runner.weights.headers import read_header
from runner.weights.tensors import read_tensors


@dataclass(frozen=True)
class Lora:
    """What a file changes in a model, and what of it was left out."""

    changes: list[Change]
    left_out: list[str]


def read_adapters(file: Path, targets: Sequence[Target], decompose_factor: int = -1) -> dict[str, Tensor]:
    """A run's parameters from a file, in fp32, scaled so that under our alpha they do what the file says.

    Raises `Invalid` where a layer is missing, unknown, of another size or kind.
    """
    header = read_header(file)
    problem = check_adapter_file(file, header, targets, decompose_factor)
    if problem is not None:
        raise Invalid(f"{file} does not fit: {problem}")
    modules = parse(header.tensors, targets).modules
    raw = read_tensors(file, {key: key for key in header.tensors}, None)
    found: dict[str, tuple[float, dict[str, Tensor]]] = {}
    ranks = {target.full_name: target.rank for target in targets}
    columns = columns_of(targets)
    for module in modules:
        tensors, scale, rank = _tensors(file, module, raw, header.metadata)
        _check_rest(file, module, tensors)
        for layer in module.layers:
            start, total = columns.get(layer.full_name, (0, 0))
            own = slice(start, start + ranks[layer.full_name]) if module.fused and rank == total else None
            found[layer.full_name] = _own(module, layer, tensors, scale, rank, header.metadata, own)
    result: dict[str, Tensor] = {}
    owners: dict[str, str] = {}
    for target in targets:
        scale, tensors = found[target.full_name]
        for name, shape in adapter_shapes(target, decompose_factor).items():
            tensor = tensors[name]
            if name == SCALED.get(target.adapter):
                tensor = tensor * (scale / target.scale)
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
    file: Path,
    layers: Sequence[Target],
    multiplier: float,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    skip_unknown: bool = False,
) -> Lora:
    """A file with adapters of any of a model's layers, of any kinds and ranks. `include` and `exclude` are regular
    expressions on names such as `unet.down_blocks.0.attentions.0.proj_in`. Raises `Invalid` where something does not fit."""
    header = read_header(file)
    checked = check_mergeable(header, layers, skip_unknown)
    if checked.problem is not None:
        hint = "--skip-unknown leaves out what the model has no place for" if checked.skippable else None
        raise Invalid(f"{file} does not fit: {checked.problem}", hint=hint)
    names = {layer.full_name: layer.diffusers for module in checked.modules for layer in module.layers}
    included, excluded = Search(include), Search(exclude)
    chosen = frozenset(
        full_name for full_name, name in names.items() if (not include or included.any(name)) and not excluded.any(name)
    )
    if not chosen:
        raise Invalid(
            f"--include and --exclude leave none of the {len(names)} layers of {file}",
            hint=f"they are looked for in names such as {next(iter(names.values()))}",
        )
    wanted = [module for module in checked.modules if any(layer.full_name in chosen for layer in module.layers)]
    raw = read_tensors(file, {key: key for module in wanted for key in module.keys.values()}, None)
    changes = []
    for module in wanted:
        tensors, scale, rank = _tensors(file, module, raw, header.metadata)
        if "lora_B" in tensors and module.fused:
            parts = [_part_scale(layer, tensors["lora_B"], scale, rank, header.metadata) for layer in module.layers]
            tensors["lora_B"] = torch.cat(
                [tensors["lora_B"][layer.rows] * part for layer, part in zip(module.layers, parts, strict=True)]
            )
            scale = 1.0
        terms = _series(header.metadata, module.layers[0]) if "oft_R" in tensors else 0
        changes.append(
            Change(
                pieces=module.layers, chosen=chosen, tensors=tensors, scale=scale, multiplier=multiplier, terms=terms
            )
        )
    return Lora(changes, checked.left_out)


def _tensors(
    file: Path, module: Module, raw: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, Tensor], float, int]:
    """A module's tensors in fp32 without alpha, its scale, and its rank (0: it has none)."""
    tensors = {name: raw[key].float() for name, key in module.keys.items()}
    odd = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
    if odd is not None:
        raise Invalid(
            f"{file}: {module.keys[odd]} holds NaN or infinite numbers", hint="the file is broken; get another"
        )
    alpha = float(tensors.pop("alpha").reshape(())) if "alpha" in tensors else None
    if "oft_blocks" in tensors:  # its alpha limits the rotation
        return tensors, alpha or 0.0, 0
    kind = kind_of(module.keys)
    factors = {
        "lora": ("lora_A",),
        "loha": ("hada_w1_b",),
        "lokr": ("lokr_w2_b", "lokr_w1_b"),
        "glora": ("glora_a2",),
    }.get(kind, ())
    rank = next((len(tensors[name]) for name in factors if name in tensors), 0)
    if alpha is not None:  # without a low rank LyCORIS and ComfyUI leave alpha aside
        return tensors, alpha / rank if rank else 1.0, rank
    settings, layer = _json_of(metadata, ADAPTER_METADATA), module.layers[0]
    rank = rank or _peft_setting(settings, layer, "r", "rank_pattern")
    return (
        tensors,
        _peft_alpha(settings, layer, rank) / rank if rank and kind in ("lora", "loha", "lokr") else 1.0,
        rank,
    )


def _own(
    module: Module,
    layer: Target,
    tensors: Mapping[str, Tensor],
    scale: float,
    rank: int,
    metadata: Mapping[str, str],
    columns: slice | None,
) -> tuple[float, dict[str, Tensor]]:
    """(scale, tensors) of one layer, of a module that may be several's. `columns`: where its ranks stand beside the others'."""
    own = {("lora_magnitude_vector" if name == "dora_scale" else name): tensor for name, tensor in tensors.items()}
    if "lora_mid" in own:
        own["lora_A"] = torch.einsum("mn...,nj->mj...", own.pop("lora_mid"), own["lora_A"].flatten(1))
    if module.fused and columns is not None and "hada_w1_a" in own:
        for number in (1, 2):
            first, second = own[f"hada_w{number}_a"][layer.rows, columns], own[f"hada_w{number}_b"][columns]
            own |= {f"hada_w{number}_a": halves_swapped(first) if layer.swapped else first, f"hada_w{number}_b": second}
        return scale, own
    if not module.fused or "lora_B" not in own:
        return scale, own
    return _unfused(layer, own, rank, scale, metadata, columns)


def _check_rest(file: Path, module: Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuses a module that changes rows which get no adapter here."""
    if not module.fused or "lora_B" not in tensors:
        return
    rest = tensors["lora_B"].clone()
    for layer in module.layers:
        rest[layer.rows] = 0
    if rest.any():
        raise Invalid(
            f"{file} does not fit: {module.name} is for more layers than {some([x.name for x in module.layers])}, which alone get adapters here",
            hint="let the others get adapters too: network.targets",
        )


def _series(metadata: Mapping[str, str], layer: Target) -> int:
    """The terms of the series by which peft approximates its rotations; 0 where the file does not say that it does."""
    settings, root = _json_of(metadata, ADAPTER_METADATA), layer.diffusers.partition(".")[0]
    terms = settings.get(f"{root}.num_cayley_neumann_terms", 5)
    return terms if settings.get(f"{root}.use_cayley_neumann") and isinstance(terms, int) and 0 < terms < 100 else 0


def _part_scale(layer: Target, up: Tensor, scale: float, rank: int, metadata: Mapping[str, str]) -> float:
    """The scale of one layer's rows. Kohya's split_qkv has a first factor for each of q, k and v in one tensor, and an alpha
    that is meant for the rank of one of them, not for that of the whole tensor."""
    own = _columns(up[layer.rows])
    split = ("runner.version" not in metadata and scale != 1.0) or "split_qkv" in metadata.get("ss_network_args", "")
    return scale * (rank // (own.stop - own.start)) if split and own.stop - own.start < rank else scale


def _columns(up: Tensor) -> slice:
    """The columns of a second factor that are a part's own: all of them, but for those of block-diagonal ones."""
    rank = up.shape[1]
    used = up.flatten(1).any(dim=0).nonzero().flatten().tolist()
    width = used[-1] - used[0] + 1 if used else rank
    return slice(used[0], used[-1] + 1) if used and rank % width == 0 and used[0] % width == 0 else slice(0, rank)


def _unfused(
    layer: Target,
    tensors: dict[str, Tensor],
    rank: int,
    scale: float,
    metadata: Mapping[str, str],
    columns: slice | None,
) -> tuple[float, dict[str, Tensor]]:
    """One layer's share of a module whose rows are several layers'."""
    scale = _part_scale(layer, tensors["lora_B"], scale, rank, metadata)
    up = tensors["lora_B"][layer.rows]
    own = _columns(up) if columns is None else columns
    up, down = up[:, own], tensors["lora_A"][own]
    found = dict(tensors) | {"lora_A": down, "lora_B": halves_swapped(up) if layer.swapped else up}
    if "lora_magnitude_vector" in found:
        magnitude = found["lora_magnitude_vector"].reshape(-1)[layer.rows]
        found["lora_magnitude_vector"] = halves_swapped(magnitude) if layer.swapped else magnitude
    return scale, found


def _json_of(metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    """A table in a file's metadata; empty where there is none."""
    try:
        content = json.loads(metadata.get(name, "{}"))
    except (ValueError, RecursionError):
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
    return value if isinstance(value, (int, float)) and 0 < value < 1e9 else 0
