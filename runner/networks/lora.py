"""Low-rank adapters (LoRA, arXiv 2106.09685; on convolutions: LoCon) through peft, on exactly the planned layers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from runner.core.rng import generator
from runner.families.spec import Target

_ADAPTER = "default"


def attach(
    modules: Mapping[str, nn.Module], targets: Sequence[Target], dropout: float, seed: int
) -> dict[str, nn.Parameter]:
    """Adds an adapter to each target and returns the trainable parameters, `component.layer.lora_A|lora_B`, in fp32.

    A is drawn (Kaiming uniform, as peft and Kohya do) from a generator of its own layer, B is zero.
    """
    from peft import LoraConfig, inject_adapter_in_model

    trainable: dict[str, nn.Parameter] = {}
    for component, module in modules.items():
        own = [target for target in targets if target.component == component]
        if not own:
            continue
        config = LoraConfig(
            r=own[0].rank,
            lora_alpha=own[0].alpha,
            lora_dropout=dropout,
            target_modules=[target.name for target in own],
            rank_pattern={re.escape(target.name): target.rank for target in own},
            alpha_pattern={re.escape(target.name): target.alpha for target in own},
        )
        inject_adapter_in_model(config, module, adapter_name=_ADAPTER)
        for target in own:
            layer: Any = module.get_submodule(target.name)
            down, up = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]
            assert down.weight.shape[0] == target.rank, f"{target.name}: peft gave rank {down.weight.shape[0]}"
            assert abs(layer.scaling[_ADAPTER] - target.alpha / target.rank) < 1e-9, target.name
            for part, name in ((down, "lora_A"), (up, "lora_B")):
                device = part.weight.device
                part.weight = nn.Parameter(torch.zeros(part.weight.shape, dtype=torch.float32, device=device))
                trainable[f"{component}.{target.name}.{name}"] = part.weight
            _draw(down.weight, seed, target)
    return trainable


def _draw(weight: nn.Parameter, seed: int, target: Target) -> None:
    bound = 1 / math.sqrt(weight[0].numel())
    drawn = torch.rand(weight.shape, generator=generator(seed, "adapter.init", target.component, target.name))
    with torch.no_grad():
        weight.copy_((drawn * 2 - 1) * bound)


def deltas(targets: Sequence[Target], state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What the adapters add to the weights: component → `layer.weight` → fp32 delta in the layer's shape."""
    found: dict[str, dict[str, Tensor]] = {}
    for target in targets:
        prefix = f"{target.component}.{target.name}"
        down, up = state[f"{prefix}.lora_A"].float(), state[f"{prefix}.lora_B"].float()
        delta = (up.flatten(1) @ down.flatten(1)) * (target.alpha / target.rank)
        shape = (target.outputs, target.inputs) + ((target.kernel, target.kernel) if target.kind == "conv" else ())
        found.setdefault(target.component, {})[f"{target.name}.weight"] = delta.reshape(shape)
    return found


def merge_into(modules: Mapping[str, nn.Module], targets: Sequence[Target], state: Mapping[str, Tensor]) -> None:
    """Adds adapters to the weights of those modules that are there. Each weight is made anew: it may be a file's map."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    added = deltas(targets, state)
    for component in modules.keys() & added.keys():
        for key, delta in added[component].items():
            layer: Any = modules[component].get_submodule(key.removesuffix(".weight"))
            if isinstance(layer, BaseTunerLayer):
                layer = layer.get_base_layer()
            weight = layer.weight.detach()
            changed = weight.float() + delta.to(weight.device).reshape(weight.shape)
            layer.weight = nn.Parameter(changed.to(weight.dtype), requires_grad=False)


def merged(
    targets: Sequence[Target], state: Mapping[str, Tensor], base: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """The base's state dicts with the adapters merged in; computed in fp32, kept in the base's dtype."""
    added = deltas(targets, state)
    return {
        component: {
            name: (tensor.float() + added[component][name]).to(tensor.dtype)
            if name in added.get(component, {})
            else tensor
            for name, tensor in tensors.items()
        }
        for component, tensors in base.items()
    }
