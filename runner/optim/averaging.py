"""Schedule-free optimizers (arXiv 2405.15682) train one set of weights and are evaluated at another, their average."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def has_average(optimizer: torch.optim.Optimizer) -> bool:
    return all("train_mode" in group for group in optimizer.param_groups)


def begin_training(optimizer: torch.optim.Optimizer) -> None:
    """Says that the weights are those that train; they always are when a run starts or goes on."""
    if has_average(optimizer):
        for group in optimizer.param_groups:
            group["train_mode"] = True


@contextmanager
def evaluated(optimizer: Any, parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor] | None]:
    """A block in which the weights are those to be looked at; it is given those that train, where they are others.

    Afterwards they are put back as they were: going there and back by calculation would change their last bits.
    """
    if not has_average(optimizer):
        yield None
        return
    backup = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield backup
    finally:
        with torch.no_grad():
            for parameter, tensor in zip(parameters, backup, strict=True):
                parameter.copy_(tensor)
        begin_training(optimizer)
