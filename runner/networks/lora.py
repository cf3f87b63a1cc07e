"""LoRA and LoCon layers: y = W x + s·B(A x), with A and B in fp32 (Hu et al., arXiv:2106.09685; conv as in LyCORIS' LoCon).

The input is narrowed once, under autocast, for both products; the second one is added into the layer's answer where that
is (`addmm`), the scale with it; layers that share A (q, k and v that files keep as one) make the first product once.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runner.core.precision import autocast_dtype


class FirstProduct:
    """x, narrowed for autocast, and A x of layers with the same A: kept from the first of them to the last."""

    def __init__(self) -> None:
        self.layers = 0
        self._left = 0
        self._of: Tensor | None = None
        self._state: tuple[int, int, bool] = (0, 0, False)
        self._made: tuple[Tensor, Tensor] | None = None

    def of(self, x: Tensor, layer: LoraLinear) -> tuple[Tensor, Tensor]:
        """Both; x is the very tensor that the layers are given."""
        state = (x._version, layer.lora_A._version, torch.is_grad_enabled())
        if self._made is None or self._of is not x or self._state != state:
            self._of, self._state, self._made, self._left = x, state, layer.first(x), self.layers
        made = self._made
        self._left -= 1
        if self._left == 0:
            self._of = self._made = None
        return made


def narrowed(x: Tensor) -> Tensor:
    """x as autocast has it, so that it does not narrow it for each product."""
    dtype = autocast_dtype(x.device)
    return x if dtype is None else x.to(dtype)


class LoraLayer(nn.Module):
    """What both kinds have. `ranks` and `modules` are shares that are left out while training, as in sd-scripts: a rank for
    a whole item, the rest made stronger; the adapter for a whole batch."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base: nn.Module, scale: float, inputs: float, ranks: float, modules: float) -> None:
        super().__init__()
        self.base_layer = base
        self.scale = scale
        self.inputs, self.ranks, self.modules_left_out = inputs, ranks, modules
        self.lora_A: nn.Parameter
        self.lora_B: nn.Parameter
        self.narrow: tuple[Tensor | None, Tensor | None] | None = None
        """Both factors as autocast has them, while NarrowFactors holds them."""

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    @property
    def weight(self) -> Tensor:
        """Of the layer itself: text encoders look at its dtype."""
        found: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return found

    @property
    def bias(self) -> Tensor | None:
        found: Tensor | None = self.base_layer.bias  # type: ignore[assignment]
        return found

    def down(self, dtype: torch.dtype) -> Tensor:
        """A in a dtype."""
        narrow = self.narrow[0] if self.narrow is not None else None
        return narrow if narrow is not None and narrow.dtype == dtype else self.lora_A.to(dtype)

    def up(self, dtype: torch.dtype) -> Tensor:
        """B in a dtype."""
        narrow = self.narrow[1] if self.narrow is not None else None
        return narrow if narrow is not None and narrow.dtype == dtype else self.lora_B.to(dtype)

    @property
    def drops(self) -> bool:
        return self.training and bool(self.inputs or self.ranks or self.modules_left_out)

    def kept_ranks(self, low: Tensor, dim: int) -> Tensor:
        """A x without the ranks that are left out of each item."""
        if not self.training or not self.ranks:
            return low
        shape = [low.shape[0]] + [1] * (low.dim() - 1)
        shape[dim] = low.shape[dim]
        kept = torch.rand(shape) >= self.ranks
        return low * kept.to(low.device, low.dtype) / (1 - self.ranks)

    def left_out(self) -> bool:
        """Whether the adapter is left out of this batch."""
        return self.training and self.modules_left_out > 0 and float(torch.rand(())) < self.modules_left_out


class LoraLinear(LoraLayer):
    """On x [..., inputs] → [..., outputs]; `lora_A` [rank, inputs], `lora_B` [outputs, rank]."""

    def __init__(
        self, base: nn.Linear, rank: int, scale: float, inputs: float = 0.0, ranks: float = 0.0, modules: float = 0.0
    ) -> None:
        super().__init__(base, scale, inputs, ranks, modules)
        self.in_features, self.out_features = base.in_features, base.out_features
        device = device_of(base)
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.shared: FirstProduct | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.drops:
            return self._plainly(narrowed(x))
        together = self.shared is not None and not torch.compiler.is_compiling()
        flat, low = self.shared.of(x, self) if together and self.shared is not None else self.first(x)
        answer: Tensor = self.base_layer(flat)
        if answer.dtype == low.dtype:
            answer = answer.addmm_(low, self.up(low.dtype).t(), alpha=self.scale)
        else:  # weights in 16 bit, computed with as they are: the adapter stays in fp32
            answer = answer + (F.linear(low, self.up(low.dtype)) * self.scale).to(answer.dtype)
        return answer.view(*x.shape[:-1], answer.shape[-1])

    def first(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [tokens, inputs] as the layer computes with it, and A x [tokens, rank]: in the same dtype under autocast, else in
        the adapter's."""
        flat = narrowed(x).flatten(0, -2)
        wide = flat.to(autocast_dtype(x.device) or self.lora_A.dtype)
        return flat, F.linear(wide, self.down(wide.dtype))

    def _plainly(self, x: Tensor) -> Tensor:
        """With what is left out."""
        answer: Tensor = self.base_layer(x)
        wide = x.to(autocast_dtype(x.device) or self.lora_A.dtype)
        low = F.linear(F.dropout(wide, self.inputs, self.training), self.down(wide.dtype))
        up = F.linear(self.kept_ranks(low, -1), self.up(wide.dtype))
        if self.left_out():
            up = torch.zeros_like(up)
        return answer + (up * self.scale).to(answer.dtype)


class LoraConv(LoraLayer):
    """On x [B, inputs, …] of a convolution over pictures or videos; `lora_A` has its kernel, `lora_B` one of 1."""

    def __init__(
        self, base: Any, rank: int, scale: float, inputs: float = 0.0, ranks: float = 0.0, modules: float = 0.0
    ) -> None:
        super().__init__(base, scale, inputs, ranks, modules)
        self.in_channels, self.out_channels = base.in_channels, base.out_channels
        device, ones = device_of(base), [1] * len(base.kernel_size)
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_channels, *base.kernel_size, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_channels, rank, *ones, device=device))

    def forward(self, x: Tensor) -> Tensor:
        x = narrowed(x)
        answer: Tensor = self.base_layer(x)
        wide = x.to(autocast_dtype(x.device) or self.lora_A.dtype)
        base: Any = self.base_layer
        low = base._conv_forward(F.dropout(wide, self.inputs, self.training), self.down(wide.dtype), None)
        pointwise = F.conv2d if low.dim() == 4 else F.conv3d
        up = pointwise(self.kept_ranks(low, 1), self.up(wide.dtype))
        if self.left_out():
            up = torch.zeros_like(up)
        return torch.add(answer, up.to(answer.dtype), alpha=self.scale)


def device_of(layer: nn.Module) -> torch.device:
    """Of its weights, quantized or not."""
    return next(itertools.chain(layer.parameters(), layer.buffers())).device


def wrapped(layer: nn.Module, rank: int, scale: float, inputs: float, ranks: float, modules: float) -> LoraLayer:
    """A layer with an adapter that is zero."""
    if isinstance(layer, nn.Linear):
        return LoraLinear(layer, rank, scale, inputs, ranks, modules)
    return LoraConv(layer, rank, scale, inputs, ranks, modules)
