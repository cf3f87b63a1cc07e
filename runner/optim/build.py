"""Optimizers by name. The arguments that each takes beyond [training.optimizer]'s own keys are listed torch-free in args.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from runner.errors import RunFailed
from schemas.training import Optimizer

Groups = Sequence[dict[str, Any]]


def optimizer_class(kind: str) -> type[torch.optim.Optimizer]:
    """The class behind a name. Raises `RunFailed` where its package is not installed."""
    if kind == "adamw":
        return torch.optim.AdamW
    assert kind == "adamw8bit", kind
    try:
        import bitsandbytes
    except ImportError:
        raise RunFailed(
            'optimizer "adamw8bit" needs the package bitsandbytes',
            hint="pip install 'runner[bitsandbytes]', or use \"adamw\"",
        ) from None
    found: type[torch.optim.Optimizer] = bitsandbytes.optim.AdamW8bit
    return found


def build_optimizer(settings: Optimizer, groups: Groups) -> torch.optim.Optimizer:
    """The optimizer over parameter groups, each with its own "lr"."""
    arguments: dict[str, Any] = {
        "betas": tuple(settings.betas), "eps": settings.eps, "weight_decay": settings.weight_decay, **settings.args
    }  # fmt: skip
    if settings.type == "adamw" and "fused" not in arguments:
        arguments["fused"] = True
    return optimizer_class(settings.type)(list(groups), **arguments)


def parameter_groups(parameters: dict[str, nn.Parameter], rates: dict[str, float]) -> list[dict[str, Any]]:
    """One group for each component (the first part of a parameter's name), with its learning rate."""
    groups: list[dict[str, Any]] = []
    for component, rate in rates.items():
        own = [parameter for name, parameter in parameters.items() if name.split(".", 1)[0] == component]
        if own:
            groups.append({"params": own, "lr": rate, "name": component})
    return groups
