"""Adapters on exactly the planned layers: LoRA and LoCon of our own, DoRA, LoHa, LoKr and OFT through peft; what trains is
kept in fp32."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from runner.model.targets import Target
from runner.networks.lora import Dropouts, FirstProduct, LoraLayer, LoraLinear, wrapped
from runner.networks.shapes import oft_block
from runner.rng import generator

ADAPTER = "default"
_ZERO = ("lora_B", "hada_w2_b", "lokr_w1", "oft_R")
"""What starts at zero, so that a fresh adapter changes nothing."""


def attach(
    modules: Mapping[str, nn.Module], targets: Sequence[Target], dropouts: Dropouts, decompose_factor: int, seed: int
) -> dict[str, nn.Parameter]:
    """Adds an adapter to each target and returns the trainable parameters, `component.layer.<name>`, in fp32.

    Each tensor is drawn (Kaiming uniform, as peft and Kohya do) from a generator of its own, or zero.
    """
    trainable: dict[str, nn.Parameter] = {}
    for component, module in modules.items():
        own = [target for target in targets if target.component == component]
        if not own:
            continue
        if own[0].adapter == "lora":
            _wrap(module, own, dropouts)
        else:
            from peft import inject_adapter_in_model

            for config in _configs(own, dropouts, decompose_factor):
                inject_adapter_in_model(config, module, adapter_name=ADAPTER)
        shared: dict[str, nn.Parameter] = {}
        for target in own:
            trainable |= _fresh(module.get_submodule(target.name), target, seed, shared)
    return trainable


def _wrap(module: nn.Module, targets: Sequence[Target], dropouts: Dropouts) -> None:
    """A LoRA layer around each target; those that share their first factor make the first product once."""
    products: dict[str, FirstProduct] = {}
    for target in targets:
        layer = wrapped(module.get_submodule(target.name), target.rank, target.scale, dropouts)
        module.set_submodule(target.name, layer)
        if target.tied and isinstance(layer, LoraLinear):
            layer.shared = products.setdefault(target.kohya, FirstProduct())
            layer.shared.layers += 1


def _configs(targets: Sequence[Target], dropouts: Dropouts, decompose_factor: int) -> list[Any]:
    import peft

    first = targets[0]
    names = {"target_modules": [target.name for target in targets]}
    patterns = {
        "rank_pattern": {re.escape(target.name): target.rank for target in targets},
        "alpha_pattern": {re.escape(target.name): target.alpha for target in targets},
    }
    if first.adapter == "dora":
        return [
            peft.LoraConfig(
                r=first.rank, lora_alpha=first.alpha, lora_dropout=dropouts.inputs, use_dora=True, **names, **patterns
            )
        ]
    if first.adapter in ("loha", "lokr"):
        extra = {} if first.adapter == "loha" else {"decompose_factor": decompose_factor}
        kind = peft.LoHaConfig if first.adapter == "loha" else peft.LoKrConfig
        return [
            kind(
                r=first.rank,
                alpha=first.alpha,
                rank_dropout=dropouts.ranks,
                module_dropout=dropouts.modules,
                **names,
                **patterns,
                **extra,
            )
        ]
    sizes: dict[int, list[str]] = {}
    for target in targets:
        sizes.setdefault(oft_block(target), []).append(target.name)
    return [
        peft.OFTConfig(r=0, oft_block_size=size, target_modules=named, use_cayley_neumann=False)
        for size, named in sizes.items()
    ]


def _fresh(layer: Any, target: Target, seed: int, shared: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """New fp32 parameters in the layer's places, by full name."""
    found: dict[str, nn.Parameter] = {}
    for name, (holder, attribute) in _places(layer).items():
        old: Tensor = holder[attribute] if isinstance(holder, nn.ParameterDict) else getattr(holder, attribute)
        if target.tied and name == "lora_A" and target.kohya in shared:
            parameter = shared[target.kohya]
        else:
            parameter = nn.Parameter(torch.zeros(old.shape, dtype=torch.float32, device=old.device))
            _draw(parameter, name, seed, target, layer)
            found[f"{target.full_name}.{name}"] = parameter
            if target.tied and name == "lora_A":
                shared[target.kohya] = parameter
        if isinstance(holder, nn.ParameterDict):
            holder[attribute] = parameter
        else:
            setattr(holder, attribute, parameter)
    return found


def _places(layer: Any) -> dict[str, tuple[Any, str]]:
    """Name of an adapter's tensor → where it is kept."""
    found: dict[str, tuple[Any, str]] = {}
    if isinstance(layer, LoraLayer):
        return {name: (layer, name) for name in layer.adapter_layer_names}
    for name in layer.adapter_layer_names:
        holder = getattr(layer, name, None)
        if holder is None or ADAPTER not in holder:
            continue
        found[name] = (holder, ADAPTER) if isinstance(holder, nn.ParameterDict) else (holder[ADAPTER], "weight")
    return found


def _draw(parameter: nn.Parameter, name: str, seed: int, target: Target, layer: Any) -> None:
    with torch.no_grad():
        if name == "lora_magnitude_vector":
            weight = layer.get_base_layer().weight.float()
            parameter.copy_(weight.flatten(1).norm(dim=1).reshape(parameter.shape))
        elif name not in _ZERO:
            bound = 1 / math.sqrt(parameter[0].numel())
            index = (target.component, target.name) if name == "lora_A" else (target.component, target.name, name)
            drawn = torch.rand(parameter.shape, generator=generator(seed, "adapter.init", *index))
            parameter.copy_((drawn * 2 - 1) * bound)
