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


@dataclass(kw_only=True)
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
    timesteps: tuple[float, ...] = ()
    """Those of the tensors, where Python can read them without a wait for the device."""
    copied: torch.cuda.Event | None = None
    """When the copy to the device has ended that was begun ahead."""

    def pinned(self) -> Batch:
        """The same in pinned memory, from which copies overlap with computation. Conditioning ("cond.") that is ON_HOST
        stays."""
        self.tensors = {name: tensor if _stays(name) else tensor.pin_memory() for name, tensor in self.tensors.items()}
        return self

    def copy_ahead(self, stream: torch.cuda.Stream) -> None:
        """Begins the copy to a stream's device."""
        with torch.cuda.stream(stream):
            self._move(stream.device)
            self.copied = stream.record_event()

    def to(self, device: torch.device) -> Batch:
        """Moves the tensors without waiting on the host. What was copied ahead is waited for on the device."""
        if self.copied is not None:
            present = torch.cuda.current_stream(device)
            present.wait_event(self.copied)
            for name, tensor in self.tensors.items():
                if not _stays(name):
                    tensor.record_stream(present)
            self.copied = None
        elif device.type != "cpu":
            self._move(device)
        return self

    def _move(self, device: torch.device) -> None:
        self.tensors = {
            name: tensor if _stays(name) else tensor.to(device, non_blocking=True)
            for name, tensor in self.tensors.items()
        }


def _stays(name: str) -> bool:
    return name.startswith("cond.") and name.removeprefix("cond.") in ON_HOST


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
