"""Adapter files merged into a run's model, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runner.families.contract import LoadOptions
from runner.families.registry import family
from runner.formats.adapter_read import read_lora
from runner.networks.merge import merge_into
from runner.plan.prepare import Prepared

States = dict[str, dict[str, Tensor]]


def components(run: Prepared) -> Sequence[str]:
    """The parts of a model that adapters can be for."""
    return tuple(dict.fromkeys(layer.component for layer in run.spec.layers(run.model)))


def modules_of(run: Prepared) -> dict[str, nn.Module]:
    options = LoadOptions(dtype=torch.float32, device=torch.device("cpu"))
    return {name: family(run.spec.name).load(run.model, name, options) for name in components(run)}


def states(modules: dict[str, nn.Module]) -> States:
    return {name: {key: x.clone() for key, x in module.state_dict().items()} for name, module in modules.items()}


def merged_file(run: Prepared, file: Path, multiplier: float = 1.0, **options: Any) -> States:
    """The model's weights with a file merged in."""
    modules = modules_of(run)
    merge_into(modules, read_lora(file, run.spec.layers(run.model), multiplier, **options).changes)
    return states(modules)
