"""Which noise levels are trained: densities over 0..1, their shift, and the range. Torch-free: one number at a time.

1 is pure noise. logit_normal, mode and cosmap: arXiv 2403.03206, section 3.1 (cosmap is its equation 21); sigmoid and
shift as in sd-scripts and musubi-tuner; beta as in SimpleTuner. The shift is that of section 5.3.2 of the same paper.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

from schemas.training import Timesteps

ShiftPoints = tuple[tuple[int, float], tuple[int, float]]
SHIFT_POINTS: ShiftPoints = ((256, 0.5), (4096, 1.16))
"""(tokens, logarithm of the shift) between which `shift = "resolution"` is a straight line, as in diffusers' SD3 pipeline."""


def draw_level(settings: Timesteps, rng: random.Random) -> float:
    """A number in 0..1 from the density, not yet shifted."""
    match settings.sampling:
        case "logit_normal":
            return _sigmoid(rng.gauss(settings.mean, settings.std))
        case "sigmoid" | "shift":
            return _sigmoid(settings.sigmoid_scale * rng.gauss(0.0, 1.0))
        case "mode":
            u = rng.random()
            return 1 - u - settings.mode_scale * (math.cos(math.pi / 2 * u) ** 2 - 1 + u)
        case "cosmap":
            return 1 - 1 / (math.tan(math.pi / 2 * rng.random()) + 1)
        case "beta":
            return rng.betavariate(settings.beta_alpha, settings.beta_beta)
        case _:
            return rng.random()


def shifted(level: float, shift: float) -> float:
    """Moves a level towards noise: larger pictures need more of it to hide as much."""
    return shift * level / (1 + (shift - 1) * level)


def shift_for(shift: float | str | None, tokens: int, points: ShiftPoints = SHIFT_POINTS) -> float:
    """The shift's factor. "resolution": exp of a straight line in the number of the denoiser's tokens."""
    if shift == "resolution":
        (few, low), (many, high) = points
        return math.exp(low + (high - low) * (tokens - few) / (many - few))
    assert not isinstance(shift, str)
    return 1.0 if shift is None else shift


def dynamic_shift(scheduler: Mapping[str, Any], tokens: int) -> float | None:
    """The shift of a sampler whose scheduler's configuration makes it depend on the size; None: it does not."""
    if not scheduler.get("use_dynamic_shifting"):
        return None

    def said(name: str, usual: Any) -> Any:
        value = scheduler.get(name)
        return usual if value is None else value

    few, many = said("base_image_seq_len", 256), said("max_image_seq_len", 4096)
    return shift_for("resolution", tokens, ((few, said("base_shift", 0.5)), (many, said("max_shift", 1.15))))


def draw_timestep(settings: Timesteps, rng: random.Random, tokens: int, points: ShiftPoints = SHIFT_POINTS) -> float:
    """A timestep in min..max."""
    level = min(max(shifted(draw_level(settings, rng), shift_for(settings.shift, tokens, points)), 0.0), 1.0)
    return settings.min + level * (settings.max - settings.min)


def draw_discrete(settings: Timesteps, rng: random.Random, tokens: int, points: ShiftPoints = SHIFT_POINTS) -> int:
    """The same for a process of whole timesteps; `max` is excluded."""
    if settings.sampling == "uniform" and shift_for(settings.shift, tokens, points) == 1:
        return rng.randrange(settings.min, settings.max)
    return min(int(draw_timestep(settings, rng, tokens, points)), settings.max - 1)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
