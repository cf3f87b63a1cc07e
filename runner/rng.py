"""Torch generators of the keys in runner/seeding.py. All draws are made on the CPU, so no device or rank changes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from runner.seeding import derive


def generator(seed: int, purpose: str, *index: int | str) -> torch.Generator:
    """A CPU generator for one purpose."""
    return torch.Generator().manual_seed(derive(seed, purpose, *index))


def normal(shape: tuple[int, ...], seed: int, purpose: str, *index: int | str) -> Tensor:
    """Standard normal numbers, fp32 [shape]."""
    return torch.randn(shape, generator=generator(seed, purpose, *index))


def seed_modules(seed: int, purpose: str, *index: int | str) -> None:
    """Seeds the global generators that modules draw from (dropout has no generator of its own)."""
    torch.manual_seed(derive(seed, purpose, *index))


@contextmanager
def forked(seed: int, purpose: str, *index: int | str) -> Iterator[None]:
    """A block in which the global CPU generator is seeded for one purpose; it is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, purpose, *index))
        yield
