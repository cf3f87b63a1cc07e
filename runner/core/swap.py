"""More model than the device holds: frozen blocks that wait on the host and come when they are needed.

Only copies to the device are made: a frozen block does not change, so its place on the device is simply given up. The
host's copies are pinned, and the next block comes on a stream of its own while the present one computes. The blocks that
were used last stay: the backward pass begins where the forward pass ended.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_Slots = list[tuple[Any, str, Tensor]]


class BlockSwap:
    """Keeps at most `len(blocks) - swapped` of the blocks on the device; the others are on the host."""

    def __init__(self, blocks: Sequence[nn.Module], swapped: int, device: torch.device) -> None:
        self.blocks, self.device = list(blocks), device
        self.room = max(1, len(self.blocks) - swapped)
        self.slots = [_frozen_tensors(block) for block in self.blocks]
        self.host: list[list[Tensor]] = []
        self.resident: OrderedDict[int, torch.cuda.Event | None] = OrderedDict()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.loads = 0
        """Blocks that were brought to the device; for tests and benchmarks."""
        # Expected: the first block of a frozen model has inputs without gradients.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        for index, block in enumerate(self.blocks):
            copies = [tensor.detach().to("cpu") for _, _, tensor in self.slots[index]]
            self.host.append([copy.pin_memory() if self.stream is not None else copy.clone() for copy in copies])
            self._give_up(index)
            block.register_forward_pre_hook(self._before(index, +1))
            block.register_full_backward_pre_hook(self._before(index, -1))

    def _before(self, index: int, direction: int) -> Any:
        def hook(*_: Any) -> None:
            self._bring(index)
            self._wait(index)
            following = index + direction
            if self.stream is not None and 0 <= following < len(self.blocks) and self.room > 1:
                self._bring(following)
                self.resident.move_to_end(index)

        return hook

    def _bring(self, index: int) -> None:
        if index in self.resident:
            self.resident.move_to_end(index)
            return
        while len(self.resident) >= self.room:
            oldest, _ = self.resident.popitem(last=False)
            self._give_up(oldest)
        self.loads += 1
        if self.stream is None:
            for (owner, name, _), host in zip(self.slots[index], self.host[index], strict=True):
                _put(owner, name, host.to(self.device, copy=True))
            self.resident[index] = None
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for (owner, name, _), host in zip(self.slots[index], self.host[index], strict=True):
                _put(owner, name, host.to(self.device, non_blocking=True))
            event = torch.cuda.Event()
            event.record(self.stream)
        self.resident[index] = event

    def _wait(self, index: int) -> None:
        event = self.resident[index]
        if event is None:
            return
        torch.cuda.current_stream(self.device).wait_event(event)
        for owner, name, _ in self.slots[index]:
            _get(owner, name).record_stream(torch.cuda.current_stream(self.device))
        self.resident[index] = None

    def _give_up(self, index: int) -> None:
        for owner, name, tensor in self.slots[index]:
            _put(owner, name, torch.empty(0, dtype=tensor.dtype, device=self.device))
        self.slots[index] = [
            (owner, name, torch.empty(0, dtype=tensor.dtype)) for owner, name, tensor in self.slots[index]
        ]


def _frozen_tensors(block: nn.Module) -> _Slots:
    """(module, name, tensor) of what does not train and is no adapter's."""
    found: _Slots = []
    for module in block.modules():
        found += [(module, name, p) for name, p in module.named_parameters(recurse=False) if not p.requires_grad]
        found += [(module, name, b) for name, b in module.named_buffers(recurse=False) if b.numel() > 1]
    return found


def _get(owner: Any, name: str) -> Tensor:
    tensor: Tensor = getattr(owner, name)
    return tensor


def _put(owner: Any, name: str, value: Tensor) -> None:
    tensor = _get(owner, name)
    if isinstance(tensor, nn.Parameter):
        tensor.data = value
    else:
        setattr(owner, name, value)
