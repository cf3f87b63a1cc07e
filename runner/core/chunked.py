"""Convolutions over time in strips: the same result with less memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def chunk_convolutions(vae: nn.Module, width: int) -> None:
    """Has every convolution over time computed in strips of `width` numbers, which overlap by what the kernel needs: the
    same result with less memory."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d) and module.kernel_size[-1] > 1:
            module.forward = _Chunked(module, width)  # type: ignore[assignment, method-assign]


class _Chunked:
    def __init__(self, conv: nn.Conv3d, width: int) -> None:
        self.conv, self.width = conv, width

    def __call__(self, x: Tensor) -> Tensor:
        conv, kernel, stride = self.conv, self.conv.kernel_size[-1], self.conv.stride[-1]
        if x.shape[-1] <= self.width + kernel - stride or conv.padding[-1]:
            return self._convolved(x)
        outputs = (x.shape[-1] - kernel) // stride + 1
        each = max(1, self.width // stride)
        pieces = [
            self._convolved(x[..., start * stride : (min(start + each, outputs) - 1) * stride + kernel])
            for start in range(0, outputs, each)
        ]
        return torch.cat(pieces, dim=-1)

    def _convolved(self, x: Tensor) -> Tensor:
        conv = self.conv
        return F.conv3d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
