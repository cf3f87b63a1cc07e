"""Learning-rate schedules as functions of the step, so that a resume needs no state.

Those of diffusers.optimization; REX (arXiv 2107.04197); warmup-stable-decay (arXiv 2404.06395); piecewise constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from runner.config.optimizer_kinds import POLYNOMIAL_END
from schemas.training import Scheduler

Factor = Callable[[int], float]


def warmup_steps(settings: Scheduler, steps: int) -> int:
    """Steps of warm-up; a share is rounded up."""
    if settings.warmup_ratio is not None:
        return math.ceil(settings.warmup_ratio * steps)
    return settings.warmup_steps or 0


def schedule(settings: Scheduler, steps: int, learning_rate: float) -> Factor:
    """step (from 0) → factor on the learning rate."""
    warmup = warmup_steps(settings, steps)
    args = settings.args
    if settings.type == "rex":
        return _warmed(warmup, lambda step: _rex((step - warmup) / max(1, steps - warmup)))
    if settings.type == "warmup_stable_decay":
        return _warmed(warmup, _stable_decay(args, steps))
    if settings.type == "piecewise":
        return _warmed(warmup, _piecewise(_list(args["boundaries"]), _list(args["factors"])))
    return _library(settings, warmup, steps, learning_rate)


def _warmed(warmup: int, then: Factor) -> Factor:
    return lambda step: step / max(1, warmup) if step < warmup else then(step)


def _rex(done: float) -> float:
    """(1 - z) / (1 - z / 2): stays high for long and falls at the end."""
    left = 1 - min(1.0, done)
    return left / (0.5 + 0.5 * left)


def _stable_decay(args: dict[str, Any], steps: int) -> Factor:
    """Constant, then down to `min_lr_ratio` over the last `decay_ratio` of the steps."""
    decay = max(1, round(args.get("decay_ratio", 0.1) * steps))
    lowest = args.get("min_lr_ratio", 0.0)

    def factor(step: int) -> float:
        done = min(1.0, max(0, step - (steps - decay)) / decay)
        return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


def _piecewise(boundaries: list[Any], factors: list[Any]) -> Factor:
    """factors[0] before the first boundary, factors[i] from boundaries[i - 1] on."""
    return lambda step: factors[sum(1 for boundary in boundaries if step >= boundary)]


def _list(value: Any) -> list[Any]:
    assert isinstance(value, list)  # checked with the configuration
    return value


def _library(settings: Scheduler, warmup: int, steps: int, learning_rate: float) -> Factor:
    name = "constant_with_warmup" if settings.type == "constant" else settings.type
    arguments: dict[str, Any] = {key: settings.args[key] for key in ("num_cycles", "power") if key in settings.args}
    # The library wants an optimizer; only its learning rate is looked at (by polynomial).
    stand_in = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=learning_rate)
    if settings.type == "polynomial":
        from diffusers.optimization import get_polynomial_decay_schedule_with_warmup

        made = get_polynomial_decay_schedule_with_warmup(
            stand_in,
            warmup,
            steps,
            lr_end=settings.args.get("lr_end", POLYNOMIAL_END),
            power=settings.args.get("power", 1.0),
        )
    elif settings.type == "cosine" and "num_cycles" in settings.args:
        from diffusers.optimization import get_cosine_schedule_with_warmup

        made = get_cosine_schedule_with_warmup(stand_in, warmup, steps, num_cycles=settings.args["num_cycles"])
    else:
        made = get_scheduler(name, stand_in, num_warmup_steps=warmup, num_training_steps=steps, **arguments)
    factor: Factor = made.lr_lambdas[0]
    return factor
