"""FramePack's sampler: UniPC (arXiv 2302.04867, B(h) = h, data prediction) on flow matching's noise levels.

diffusers' UniPC is singular at order 3 on these levels. The levels are shifted by the size of what is made, as in Flux.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

ORDER = 3
SHIFT_POINTS = ((256, 0.5), (4096, 1.15))
"""(tokens, logarithm of the shift) between which the shift is a straight line."""
LARGEST_SHIFT = 7.0
Velocity = Callable[[Tensor, float], Tensor]
"""(x, timestep in 0..1000) → the velocity, in fp32."""


def sigmas(steps: int, tokens: int, shift: float | None) -> list[float]:
    """Noise levels from 1 to 0, `steps` + 1 of them. `shift` None: from the number of tokens."""
    if shift is None:
        (few, low), (many, high) = SHIFT_POINTS
        mu = min(low + (tokens - few) * (high - low) / (many - few), math.log(LARGEST_SHIFT))
    else:
        mu = math.log(shift)
    factor = math.exp(mu)
    levels = (1 - index / steps for index in range(steps + 1))
    return [factor * level / (1 + (factor - 1) * level) for level in levels]


def sample(velocity: Velocity, noise: Tensor, levels: list[float]) -> Tensor:
    """Follows the flow from `noise` at levels[0]; returns the prediction of the data at the last level above 0."""
    steps = len(levels) - 1
    order = min(ORDER, steps - 1)

    def data(x: Tensor, sigma: float) -> Tensor:
        return x - sigma * velocity(x, 1000 * sigma)

    x = noise
    known = [data(x, levels[0])]
    for index in range(1, steps):
        x, predicted = _step(x, known, levels, index, min(index, order), data)
        known.append(predicted)
        known = known[-ORDER:]
    return known[-1]


def _step(
    x: Tensor, known: list[Tensor], levels: list[float], index: int, order: int, data: Callable[[Tensor, float], Tensor]
) -> tuple[Tensor, Tensor]:
    """(x at levels[index], the prediction there): predicted with what is known, then corrected with the prediction."""
    here, before = levels[index], levels[index - 1]
    newest = known[-1]
    step = math.log(here / before)
    base = (here / before) * x - (here / before - 1) * newest
    ratios = [(math.log(before) - math.log(levels[index - 1 - j])) / -step for j in range(1, order)] + [1.0]
    slopes = [(known[-1 - j] - newest) / ratios[j - 1] for j in range(1, order)]
    matrix, right = _system(ratios, step)
    predictor = [0.5] if order == 2 else _solved(matrix, right, order - 1)
    guess = base - step * _combined(predictor, slopes, x)
    predicted = data(guess, here)
    corrector = [0.5] if order == 1 else _solved(matrix, right, order)
    return base - step * _combined(corrector, [*slopes, predicted - newest], x), predicted


def _system(ratios: list[float], step: float) -> tuple[list[list[float]], list[float]]:
    """The equations of order conditions: rows of powers of the ratios, and phi's values."""
    phi = math.expm1(step) / step - 1
    rows, right, factorial = [], [], 1
    for power in range(1, len(ratios) + 1):
        rows.append([ratio ** (power - 1) for ratio in ratios])
        factorial *= power
        right.append(phi * factorial / step)
        phi = phi / step - 1 / math.factorial(power + 1)
    return rows, right


def _solved(matrix: list[list[float]], right: list[float], count: int) -> list[float]:
    if count == 0:
        return []
    rows = torch.tensor([row[:count] for row in matrix[:count]], dtype=torch.float64)
    found: list[float] = torch.linalg.solve(rows, torch.tensor(right[:count], dtype=torch.float64)).tolist()
    return found


def _combined(weights: list[float], terms: list[Tensor], like: Tensor) -> Tensor:
    total = torch.zeros_like(like)
    for weight, term in zip(weights, terms, strict=False):
        total = total + weight * term
    return total
