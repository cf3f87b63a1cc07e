"""Learning-rate schedules of diffusers.optimization as functions of the step, so that a resume needs no state."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from diffusers.optimization import get_scheduler

from schemas.training import Scheduler


def warmup_steps(settings: Scheduler, steps: int) -> int:
    """Steps of warm-up; a share is rounded up."""
    if settings.warmup_ratio is not None:
        return math.ceil(settings.warmup_ratio * steps)
    return settings.warmup_steps or 0


def schedule(settings: Scheduler, steps: int, learning_rate: float) -> Callable[[int], float]:
    """step (from 0) → factor on the learning rate."""
    warmup = warmup_steps(settings, steps)
    name = "constant_with_warmup" if settings.type == "constant" else settings.type
    arguments: dict[str, float] = {}
    if "num_cycles" in settings.args:
        arguments["num_cycles"] = settings.args["num_cycles"]
    if "power" in settings.args:
        arguments["power"] = settings.args["power"]
    # The library wants an optimizer; only its learning rate is looked at (by polynomial).
    stand_in = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=learning_rate)
    if settings.type == "polynomial":
        from diffusers.optimization import get_polynomial_decay_schedule_with_warmup

        made = get_polynomial_decay_schedule_with_warmup(
            stand_in, warmup, steps, lr_end=settings.args.get("lr_end", 1e-7), power=settings.args.get("power", 1.0)
        )
    elif settings.type == "cosine" and "num_cycles" in settings.args:
        from diffusers.optimization import get_cosine_schedule_with_warmup

        made = get_cosine_schedule_with_warmup(stand_in, warmup, steps, num_cycles=settings.args["num_cycles"])
    else:
        made = get_scheduler(name, stand_in, num_warmup_steps=warmup, num_training_steps=steps, **arguments)
    factor: Callable[[int], float] = made.lr_lambdas[0]
    return factor
