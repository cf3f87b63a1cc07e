"""The learning rates that an optimizer really uses, for the log. Reading them may wait for the device: only where a line
is logged."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from runner.optim.single import SingleOptimizers

Group = dict[str, Any]


def effective_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """`lr` of a single group, `lr/NAME` of several; of optimizers that estimate the distance to the solution (Prodigy,
    D-Adaptation) it is d·lr, and `d`, `d/NAME` are there too. Means over the tensors where each has its own."""
    gathered: dict[str, list[float]] = {}
    groups = optimizer.param_groups
    several = len({name_of(index, group) for index, group in enumerate(groups)}) > 1
    for index, group in enumerate(groups):
        suffix = f"/{name_of(index, group)}" if several else ""
        for owner, own in _holders(optimizer, group):
            distance = own.get("d")
            for rate in _rates(owner, own):
                gathered.setdefault("lr" + suffix, []).append(rate if distance is None else float(distance) * rate)
            if distance is not None:
                gathered.setdefault("d" + suffix, []).append(float(distance))
    return {name: math.fsum(values) / len(values) for name, values in gathered.items()}


def name_of(index: int, group: Group) -> str:
    """A group's name in the log; a class may have dropped it."""
    return str(group.get("name", index))


def _holders(optimizer: torch.optim.Optimizer, group: Group) -> Iterator[tuple[torch.optim.Optimizer, Group]]:
    """The optimizers that step the tensors of a group, each with its own record of the group."""
    if not isinstance(optimizer, SingleOptimizers):
        yield optimizer, group
        return
    for single in optimizer.singles_of(group):
        yield single, single.param_groups[0]


def _rates(optimizer: torch.optim.Optimizer, group: Group) -> list[float]:
    """The rates of a group's tensors, one where all have the same."""
    if group.get("scheduled_lr"):  # schedule-free: with its own warm-up
        return [float(group["scheduled_lr"])]
    if {"relative_step", "scale_parameter", "warmup_init"} <= group.keys():
        states = [optimizer.state[p] for p in group["params"] if "RMS" in optimizer.state.get(p, {})]
        if states:
            return [_adafactor(group, state) for state in states]
    return [float(group["lr"])]


def _adafactor(group: Group, state: dict[str, Any]) -> float:
    """Section 8 of arXiv 1804.04235: a step relative to the tensor's size, shrinking with the number of steps."""
    rate = float(group["lr"])
    if group["relative_step"]:
        rate = min(1e-6 * state["step"] if group["warmup_init"] else 1e-2, 1.0 / math.sqrt(state["step"]))
    scale = max(group["eps"][1], float(state["RMS"])) if group["scale_parameter"] else 1.0
    return scale * rate
