"""The factors of all LoRA layers in one flat fp32 buffer, which autocast's dtype is made of once a forward pass: one cast, and
one of the gradients, where there would be two of each for every layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from runner.core.precision import autocast_dtype
from runner.networks.lora import LoraLayer


class NarrowFactors:
    """Lays the factors out in one buffer (parameters stay what they are, with other storage) and hands the layers their
    narrow ones until the weights change."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.layers = [part for module in modules for part in module.modules() if isinstance(part, LoraLayer)]
        factors = (factor for layer in self.layers for factor in (layer.lora_A, layer.lora_B) if factor.requires_grad)
        self.factors = list({id(factor): factor for factor in factors}.values())
        self.flat = torch.empty(0)
        self.places: list[int] = []
        """Where the buffer has each of them."""

    def refresh(self) -> None:
        """Before each forward pass whose backward pass follows; inside autocast."""
        dtype = autocast_dtype(self.factors[0].device) if self.factors else None
        if dtype is None:
            return self.clear()
        self._lay_out()
        made = dict(zip(map(id, self.factors), _Narrow.apply(dtype, self.flat, *self.factors), strict=True))
        for layer in self.layers:
            layer.narrow = made.get(id(layer.lora_A)), made.get(id(layer.lora_B))

    def clear(self) -> None:
        """The weights change: what is narrow is no longer they."""
        for layer in self.layers:
            layer.narrow = None

    def _lay_out(self) -> None:
        """Where a factor is not in its place: at first, and where something gave it other storage."""
        if [factor.data_ptr() for factor in self.factors] == self.places:
            return
        with torch.no_grad():
            self.flat = torch.cat([factor.reshape(-1) for factor in self.factors])
            for factor, place in zip(self.factors, _cut(self.flat, self.factors), strict=True):
                factor.data = place
        self.places = [factor.data_ptr() for factor in self.factors]


class _Narrow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, flat: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(_cut(flat.to(dtype), factors))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of a factor that took no part there is none."""
        given = [gradient for gradient in gradients if gradient is not None]
        wide = iter(_cut(torch.cat([gradient.reshape(-1) for gradient in given]).float(), given))
        return None, None, *(None if gradient is None else next(wide) for gradient in gradients)


def _cut(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A buffer's parts, one of each one's shape."""
    parts = flat.split([one.numel() for one in like])
    return [part.view(one.shape) for part, one in zip(parts, like, strict=True)]
