"""What the backward pass needs of the forward pass, kept on the host meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

SMALLEST = 2**20
"""Bytes below which a tensor stays: it is not worth the way."""


@contextmanager
def saved_on_host(device: torch.device, parameters: frozenset[int] = frozenset()) -> Iterator[None]:
    """A block whose large activations are moved to pinned host memory until their gradients are computed.

    `parameters` are the addresses of weights, which stay. With gradient checkpointing only the blocks' inputs go.
    """

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        stays = (
            isinstance(tensor, torch.nn.Parameter)
            or tensor.numel() * tensor.element_size() < (SMALLEST if device.type == "cuda" else 1)
            or tensor.untyped_storage().data_ptr() in parameters
        )
        if stays:
            return tensor.device, tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=device.type == "cuda")
        host.copy_(tensor, non_blocking=True)
        return tensor.device, host

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        home, tensor = packed
        return tensor.to(home, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
