"""What the loop needs of a training task, and what one micro-batch is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass
class Batch:
    """One micro-batch, made ahead of its step. `names` are its items, for messages; `share` is its part of the step.

    `texts`, `requests` and `items` are what a task needs that encodes captions and pictures itself.
    """

    step: int
    names: tuple[str, ...]
    share: float
    tensors: dict[str, Tensor]
    texts: tuple[str, ...] = ()
    requests: tuple[Any, ...] = ()
    items: tuple[Any, ...] = ()
    clips: tuple[Tensor, ...] = ()
    """Pixels that are not of one length, which no tensor can hold together."""

    def to(self, device: torch.device) -> Batch:
        """Moves the tensors without waiting; from pinned memory the copy overlaps with computation."""
        if device.type != "cpu":
            self.tensors = {
                name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in self.tensors.items()
            }
        return self


class Task(Protocol):
    """A thing to train. The loop knows nothing else of models and data."""

    device: torch.device
    parameters: Mapping[str, nn.Parameter]

    def steps_from(self, step: int) -> Iterator[list[Batch]]:
        """The micro-batches of each optimizer step from `step` (0-based) on."""
        ...

    def loss(self, batch: Batch) -> Tensor:
        """The mean loss of a micro-batch, a scalar on the device."""
        ...

    def train_mode(self, on: bool) -> None: ...

    def stepped(self) -> None:
        """Called after each optimizer step."""
        ...
