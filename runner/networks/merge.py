"""Merging adapters into modules and state dicts; networks/formulas.py says what each kind makes of a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runner.model.targets import Target
from runner.networks.formulas import changed
from runner.networks.formulas import delta as difference
from runner.networks.quantize import QuantizedLinear
from runner.networks.shapes import BIASES

State = Mapping[str, Tensor]
"""`component.layer.<name>` → tensor."""


def by_layer(targets: Sequence[Target], state: State) -> dict[str, dict[str, Tensor]]:
    """Full name of each layer → its adapter's tensors by name, in fp32."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        layer, _, last = name.rpartition(".")
        found.setdefault(layer, {})[last] = tensor.float()
    shared = {
        target.kohya: found[target.full_name]["lora_A"]
        for target in targets
        if target.tied and "lora_A" in found.get(target.full_name, {})
    }
    return {
        target.full_name: {"lora_A": shared[target.kohya], **found[target.full_name]}
        if target.tied
        else found[target.full_name]
        for target in targets
    }


def delta(target: Target, tensors: Mapping[str, Tensor]) -> Tensor:
    """What lora, loha and lokr add to the weight [outputs, inputs, …], flattened to two dimensions."""
    return difference(tensors, target.scale, target.shape).flatten(1)


def adapted(target: Target, tensors: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """The weight with a trained adapter in it, in fp32 and in the weight's shape."""
    return changed(tensors, target.scale, weight)


def halves_swapped(tensor: Tensor) -> Tensor:
    """The rows' second half first: some layers say scale and shift the other way round than their originals."""
    return torch.cat(tensor.chunk(2)[::-1])


@dataclass(frozen=True, kw_only=True)
class Change:
    """What one module of an adapter file does: to a layer, or to several whose rows it holds together."""

    pieces: tuple[Target, ...]
    """The layers of its rows, in order; `part`, `span` and `swapped` say which rows they are."""
    chosen: frozenset[str]
    """The full names of those that are to change."""
    tensors: Mapping[str, Tensor]
    scale: float
    multiplier: float = 1.0
    terms: int = 0


def merge_into(modules: Mapping[str, nn.Module], changes: Sequence[Change]) -> None:
    """Merges adapters into those modules that are there. Each parameter is made anew: it may be a file's map."""
    for change in changes:
        component = modules.get(change.pieces[0].component)
        if component is None:
            continue
        layers = [_layer(component, piece.name) for piece in change.pieces]
        for name in ("weight", "bias"):
            own = {key: tensor for key, tensor in change.tensors.items() if (key in BIASES) == (name == "bias")}
            if not own:
                continue
            whole = torch.cat(
                [
                    _swapped(piece, getattr(layer, name).detach())
                    for piece, layer in zip(change.pieces, layers, strict=True)
                ]
            )
            if name == "weight":
                whole = changed(own, change.scale, whole, change.multiplier, change.terms)
            else:
                whole = whole.float() + change.multiplier * next(iter(own.values())).reshape(-1).to(whole.device)
            for piece, layer, rows in zip(
                change.pieces, layers, whole.split([piece.outputs for piece in change.pieces]), strict=True
            ):
                if piece.full_name in change.chosen:
                    _put(component, layer, name, _swapped(piece, rows))


def _layer(component: nn.Module, name: str) -> Any:
    layer = component.get_submodule(name)
    return getattr(layer, "base_layer", layer)


def _swapped(piece: Target, rows: Tensor) -> Tensor:
    return halves_swapped(rows) if piece.swapped else rows


def _put(component: nn.Module, layer: Any, name: str, tensor: Tensor) -> None:
    """A new weight or bias of the same shape in the layer's place."""
    if isinstance(layer, QuantizedLinear) and name == "weight":
        layer.pack(tensor)
        return
    old = getattr(layer, name)
    new = nn.Parameter(tensor.to(old.dtype).clone(), requires_grad=False)
    for module in component.modules() if isinstance(layer, nn.Embedding) else (layer,):
        if getattr(module, name, None) is old:  # T5 has its embedding in two places
            setattr(module, name, new)


def merged(
    targets: Sequence[Target], state: State, base: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """The base's state dicts with the adapters merged in; computed in fp32, kept in the base's dtype."""
    layers = by_layer(targets, state)
    by_key = {(target.component, f"{target.name}.weight"): target for target in targets}
    found: dict[str, dict[str, Tensor]] = {}
    for component, tensors in base.items():
        found[component] = {}
        for name, tensor in tensors.items():
            target = by_key.get((component, name))
            if target is not None:
                tensor = adapted(target, layers[target.full_name], tensor).to(tensor.dtype)
            found[component][name] = tensor
    return found


def scale_down(targets: Sequence[Target], parameters: Mapping[str, nn.Parameter], limit: float) -> None:
    """Max-norm regularization (sd-scripts' scale_weight_norms): halves of a product with a larger norm are scaled by the
    square root of what is too much. Layers that share their first factor are one product."""
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(target.kohya if target.tied else target.full_name, []).append(target)
    with torch.no_grad():
        for group in groups.values():
            down = parameters[f"{group[0].full_name}.lora_A"]
            ups = [parameters[f"{target.full_name}.lora_B"] for target in group]
            scaled = [up.flatten(1) * target.scale for up, target in zip(ups, group, strict=True)]
            product = torch.cat(scaled) @ down.flatten(1)
            norm = product.norm().clamp(min=limit / 2)
            factor = (norm.clamp(max=limit) / norm).sqrt()
            for tensor in (down, *ups):
                tensor.mul_(factor)
