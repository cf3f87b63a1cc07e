"""LoRA and LoCon layers: y = W x + s·B(A x), with A and B in fp32 (Hu et al., arXiv:2106.09685; conv as in LyCORIS' LoCon).

The input is narrowed once, under autocast, for both products; the second one is added into the layer's answer where that
is (`addmm`), the scale with it; layers that share A (q, k and v that files keep as one) make the first product once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runner.core.precision import autocast_dtype

Product = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Dropouts:
    """Shares that are left out while training, as in sd-scripts: of the input; of the ranks, for a whole item, the rest made
    stronger; the adapter for a whole batch."""

    inputs: float = 0.0
    ranks: float = 0.0
    modules: float = 0.0


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
    """What both kinds have."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base: nn.Module, scale: float, dropouts: Dropouts) -> None:
        super().__init__()
        self.base_layer = base
        self.scale, self.dropouts = scale, dropouts
        self.lora_A: nn.Parameter
        self.lora_B: nn.Parameter
        self.narrow: tuple[Tensor | None, Tensor | None] | None = None
        """Both factors as autocast has them, while NarrowFactors holds them."""

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
        return self.training and self.dropouts != Dropouts()

    def apart(self, x: Tensor, first: Product, second: Product, ranks: int) -> Tensor:
        """B(A x) without what is left out; `first` and `second` multiply by a factor, `ranks` is their dimension."""
        wide = x.to(autocast_dtype(x.device) or self.lora_A.dtype)
        low = first(F.dropout(wide, self.dropouts.inputs, self.training), self.down(wide.dtype))
        up = second(self._kept_ranks(low, ranks), self.up(wide.dtype))
        return torch.zeros_like(up) if self._left_out() else up

    def _kept_ranks(self, low: Tensor, dim: int) -> Tensor:
        """A x without the ranks that are left out of each item."""
        if not self.training or not self.dropouts.ranks:
            return low
        shape = [low.shape[0]] + [1] * (low.dim() - 1)
        shape[dim] = low.shape[dim]
        kept = torch.rand(shape) >= self.dropouts.ranks
        return low * kept.to(low.device, low.dtype) / (1 - self.dropouts.ranks)

    def _left_out(self) -> bool:
        """Whether the adapter is left out of this batch."""
        share = self.dropouts.modules
        return self.training and share > 0 and float(torch.rand(())) < share


class LoraLinear(LoraLayer):
    """On x [..., inputs] → [..., outputs]; `lora_A` [rank, inputs], `lora_B` [outputs, rank]."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropouts: Dropouts = Dropouts()) -> None:
        super().__init__(base, scale, dropouts)
        self.in_features, self.out_features = base.in_features, base.out_features
        device = device_of(base)
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.shared: FirstProduct | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.drops:
            x = narrowed(x)
            answer: Tensor = self.base_layer(x)
            return answer + (self.apart(x, F.linear, F.linear, -1) * self.scale).to(answer.dtype)
        together = self.shared is not None and not torch.compiler.is_compiling()
        flat, low = self.shared.of(x, self) if together and self.shared is not None else self.first(x)
        answer = self.base_layer(flat)
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


class LoraConv(LoraLayer):
    """On x [B, inputs, …] of a convolution over pictures or videos; `lora_A` has its kernel, `lora_B` one of 1."""

    def __init__(self, base: Any, rank: int, scale: float, dropouts: Dropouts = Dropouts()) -> None:
        super().__init__(base, scale, dropouts)
        self.in_channels, self.out_channels = base.in_channels, base.out_channels
        device, ones = device_of(base), [1] * len(base.kernel_size)
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_channels, *base.kernel_size, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_channels, rank, *ones, device=device))

    def forward(self, x: Tensor) -> Tensor:
        x, base = narrowed(x), cast(Any, self.base_layer)
        answer: Tensor = base(x)
        pointwise = F.conv2d if answer.dim() == 4 else F.conv3d
        up = self.apart(x, partial(base._conv_forward, bias=None), pointwise, 1)
        return torch.add(answer, up.to(answer.dtype), alpha=self.scale)


def device_of(layer: nn.Module) -> torch.device:
    """Of its weights, quantized or not."""
    return next(itertools.chain(layer.parameters(), layer.buffers())).device


def wrapped(layer: nn.Module, rank: int, scale: float, dropouts: Dropouts = Dropouts()) -> LoraLayer:
    """A layer with an adapter that is zero."""
    if isinstance(layer, nn.Linear):
        return LoraLinear(layer, rank, scale, dropouts)
    return LoraConv(layer, rank, scale, dropouts)
