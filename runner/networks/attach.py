"""Adapters through peft on exactly the planned layers: LoRA, LoCon, DoRA, LoHa, LoKr, OFT; what trains is kept in fp32."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runner.model.targets import Target
from runner.networks.shapes import oft_block
from runner.rng import generator

ADAPTER = "default"
_ZERO = ("lora_B", "hada_w2_b", "lokr_w1", "oft_R")
"""What starts at zero, so that a fresh adapter changes nothing."""


@dataclass(frozen=True)
class Dropouts:
    """Shares that are left out while training."""

    inputs: float = 0.0
    ranks: float = 0.0
    modules: float = 0.0


def attach(
    modules: Mapping[str, nn.Module], targets: Sequence[Target], dropouts: Dropouts, decompose_factor: int, seed: int
) -> dict[str, nn.Parameter]:
    """Adds an adapter to each target and returns the trainable parameters, `component.layer.<name>`, in fp32.

    Each tensor is drawn (Kaiming uniform, as peft and Kohya do) from a generator of its own, or zero.
    """
    from peft import inject_adapter_in_model

    trainable: dict[str, nn.Parameter] = {}
    for component, module in modules.items():
        own = [target for target in targets if target.component == component]
        if not own:
            continue
        for config in _configs(own, dropouts, decompose_factor):
            inject_adapter_in_model(config, module, adapter_name=ADAPTER)
        shared: dict[str, nn.Parameter] = {}
        for target in own:
            layer: Any = module.get_submodule(target.name)
            trainable |= _fresh(layer, target, seed, shared)
            if target.adapter == "lora":
                _drop_out(layer, dropouts)
    return trainable


def _configs(targets: Sequence[Target], dropouts: Dropouts, decompose_factor: int) -> list[Any]:
    import peft

    first = targets[0]
    names = {"target_modules": [target.name for target in targets]}
    patterns = {
        "rank_pattern": {re.escape(target.name): target.rank for target in targets},
        "alpha_pattern": {re.escape(target.name): target.alpha for target in targets},
    }
    if first.adapter in ("lora", "dora"):
        return [
            peft.LoraConfig(
                r=first.rank,
                lora_alpha=first.alpha,
                lora_dropout=dropouts.inputs,
                use_dora=first.adapter == "dora",
                **names,
                **patterns,
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
    """Name of an adapter's tensor → where peft keeps it."""
    found: dict[str, tuple[Any, str]] = {}
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


def _drop_out(layer: Any, dropouts: Dropouts) -> None:
    """Rank and module dropout of LoRA as in sd-scripts: a rank is left out for a whole item and the rest made stronger;
    a module is left out for a whole batch."""
    if dropouts.ranks > 0:

        def without_ranks(module: nn.Module, _: Any, output: Tensor) -> Tensor:
            if not module.training:
                return output
            dim = 1 if output.dim() == 4 else -1
            shape = [output.shape[0]] + [1] * (output.dim() - 1)
            shape[dim] = output.shape[dim]
            kept = torch.rand(shape) >= dropouts.ranks
            return output * kept.to(output.device, output.dtype) / (1 - dropouts.ranks)

        layer.lora_A[ADAPTER].register_forward_hook(without_ranks)
    if dropouts.modules > 0:

        def left_out(module: nn.Module, _: Any, output: Tensor) -> Tensor:
            dropped = module.training and float(torch.rand(())) < dropouts.modules
            return torch.zeros_like(output) if dropped else output

        layer.lora_B[ADAPTER].register_forward_hook(left_out)
