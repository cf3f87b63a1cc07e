"""What adapters make of weights: each kind's formula in fp32, and merging into modules and state dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from runner.families.spec import Target
from runner.networks.quantize import QuantizedLinear

State = Mapping[str, Tensor]
"""`component.layer.<name>` → tensor."""


def by_layer(targets: Sequence[Target], state: State) -> dict[str, dict[str, Tensor]]:
    """Full name of each layer → its adapter's tensors by name, in fp32."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        layer, _, last = name.rpartition(".")
        found.setdefault(layer, {})[last] = tensor.float()
    shared = {target.kohya: found[target.full_name]["lora_A"] for target in targets if target.tied and "lora_A" in found.get(target.full_name, {})}  # fmt: skip
    return {
        target.full_name: {"lora_A": shared[target.kohya], **found[target.full_name]} if target.tied else found[target.full_name]
        for target in targets
    }  # fmt: skip


def delta(target: Target, tensors: Mapping[str, Tensor]) -> Tensor:
    """What lora, loha and lokr add to the weight [outputs, inputs, …], flattened to two dimensions."""
    if target.adapter == "loha":
        first = tensors["hada_w1_a"] @ tensors["hada_w1_b"]
        second = tensors["hada_w2_a"] @ tensors["hada_w2_b"]
        return first * second * target.scale
    if target.adapter == "lokr":
        right = tensors.get("lokr_w2")
        if right is None:
            right = tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
        rows, columns = target.outputs // tensors["lokr_w1"].shape[0], target.inputs // tensors["lokr_w1"].shape[1]
        right = right.reshape(rows, columns, -1)
        whole = torch.einsum("ac,bdk->abcdk", tensors["lokr_w1"], right)
        return whole.reshape(target.outputs, -1) * target.scale
    return (tensors["lora_B"].flatten(1) @ tensors["lora_A"].flatten(1)) * target.scale


def adapted(target: Target, tensors: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """The weight with the adapter in it, in fp32 and in the weight's shape."""
    base = weight.float().flatten(1)
    if target.adapter == "oft":
        return (base @ _rotation(tensors["oft_R"], base.shape[1]).T).reshape(weight.shape)
    changed = base + delta(target, tensors).to(base.device)
    if target.adapter == "dora":
        magnitude = tensors["lora_magnitude_vector"].reshape(-1, 1).to(base.device)
        changed = magnitude * changed / changed.norm(dim=1, keepdim=True)
    return changed.reshape(weight.shape)


def _rotation(skew: Tensor, width: int) -> Tensor:
    """The block-diagonal rotation R [width, width] of x → x R that peft's OFT applies (Cayley transform)."""
    blocks = skew.shape[0]
    size = width // blocks
    rows, columns = torch.triu_indices(size, size, 1)
    matrix = skew.new_zeros(blocks, size, size)
    matrix[:, rows, columns] = skew
    matrix = matrix - matrix.transpose(-2, -1)
    eye = torch.eye(size, device=skew.device).expand(blocks, size, size)
    rotations = torch.linalg.solve(eye + matrix, eye - matrix, left=False)
    return torch.block_diag(*rotations)


def halves_swapped(tensor: Tensor) -> Tensor:
    """The rows' second half first: some layers say scale and shift the other way round than their originals."""
    return torch.cat(tensor.chunk(2)[::-1])


def merge_into(modules: Mapping[str, nn.Module], targets: Sequence[Target], state: State) -> None:
    """Adds adapters to the weights of those modules that are there. Each weight is made anew: it may be a file's map."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = by_layer(targets, state)
    for target in targets:
        if target.component not in modules:
            continue
        layer: Any = modules[target.component].get_submodule(target.name)
        if isinstance(layer, BaseTunerLayer):
            layer = layer.get_base_layer()
        weight = layer.weight.detach()
        changed = adapted(target, layers[target.full_name], weight)
        if isinstance(layer, QuantizedLinear):
            layer.pack(changed)
        else:
            layer.weight = nn.Parameter(changed.to(weight.dtype), requires_grad=False)


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
            product = torch.cat([up.flatten(1) for up in ups]) @ down.flatten(1) * group[0].scale
            norm = product.norm().clamp(min=limit / 2)
            factor = (norm.clamp(max=limit) / norm).sqrt()
            for tensor in (down, *ups):
                tensor.mul_(factor)
