"""What the loop needs of a training task, and what one micro-batch is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

ON_HOST = frozenset({"mask"})
"""Conditioning that says how much there is of something, not what: it decides shapes, so it stays where Python can read it
without a wait for the device. Text masks are the only one."""


def moved(conditioning: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Conditioning on the device, but for what stays on the host."""
    return {name: tensor if name in ON_HOST else tensor.to(device) for name, tensor in conditioning.items()}


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
        """Moves the tensors without waiting; from pinned memory the copy overlaps with computation. Conditioning ("cond.")
        that is ON_HOST stays."""
        if device.type != "cpu":
            self.tensors = {name: self._moved(name, tensor, device) for name, tensor in self.tensors.items()}
        return self

    @staticmethod
    def _moved(name: str, tensor: Tensor, device: torch.device) -> Tensor:
        if name.startswith("cond.") and name.removeprefix("cond.") in ON_HOST:
            return tensor
        return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


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
