"""Frozen linear layers in fewer bits: fp8, fp8 with scales, int8, nf4. Computed in the activations' precision.

The weight is widened inside the forward pass and again inside the backward pass, so that no wide copy is kept between
them; the gradient with regard to the input is exact for the widened weight. nf4 (arXiv 2305.14314) is bitsandbytes'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from runner.core.precision import autocast_dtype

BLOCK = 64
"""Weights that share a scale in fp8_scaled, along the input; as in musubi-tuner."""
NF4_BLOCK = 64
E4M3_MAX = 448.0
KINDS = ("none", "fp8", "fp8_scaled", "int8", "nf4")


class QuantizedLinear(nn.Linear):
    """A linear layer whose frozen weight is held in fewer bits. `weight` is its widened copy, made when asked for."""

    data: Tensor
    scale: Tensor

    def __init__(self, source: nn.Linear, kind: str, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = source.in_features, source.out_features, kind
        self.wide = source.weight.dtype
        weight = source.weight.detach().to(device)
        data, scale = _packed(weight, kind)
        self.register_buffer("data", data, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        bias = source.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(device), requires_grad=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.widened(self.wide)

    def pack(self, weight: Tensor) -> None:
        """Holds another weight of the same shape."""
        self.data, self.scale = _packed(weight.to(self.wide), self.kind)

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weight [outputs, inputs]."""
        shape = (self.out_features, self.in_features)
        data, scale = self.data, self.scale
        if self.kind == "fp8":
            return data.to(dtype)
        if self.kind == "fp8_scaled":
            wide = data.to(torch.float32).view(shape[0], -1, _block(shape[1])) * scale[..., None]
            return wide.view(shape).to(dtype)
        if self.kind == "int8":
            return (data.to(torch.float32) * scale).to(dtype)
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state = QuantState(
            scale,
            shape=torch.Size(shape),
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=self.wide,
            code=_nf4_code(data.device),
        )
        return dequantize_4bit(data, state).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(autocast_dtype(x.device) or x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        answer: Tensor = _Product.apply(x, self, bias)
        return answer


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.widened(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.layer.widened(grad.dtype), None, None


def _block(inputs: int) -> int:
    """Weights in a block: 64 where they divide the row, else the whole row."""
    return BLOCK if inputs % BLOCK == 0 else inputs


def _packed(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    nothing = torch.empty(0, device=weight.device)
    if kind == "fp8":
        return weight.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), nothing
    wide = weight.float()
    if kind == "fp8_scaled":
        blocks = wide.view(len(wide), -1, _block(wide.shape[1]))
        scale = (blocks.abs().amax(dim=-1) / E4M3_MAX).clamp(min=1e-12)
        return (blocks / scale[..., None]).to(torch.float8_e4m3fn).view(weight.shape), scale
    if kind == "int8":
        scale = (wide.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-12)
        return (wide / scale).round().to(torch.int8), scale
    from bitsandbytes.functional import quantize_4bit

    data, state = quantize_4bit(wide.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
    return data, state.absmax


def _nf4_code(device: torch.device) -> Tensor:
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type("nf4", device=device)


def quantize(module: nn.Module, kind: str, inside: Callable[[str], bool], device: torch.device) -> None:
    """Replaces the linear layers whose names are `inside`, one after the other: only one is ever held twice."""
    names = [name for name, layer in module.named_modules() if type(layer) is nn.Linear and inside(name)]
    for name in names:
        owner, _, last = name.rpartition(".")
        parent: Any = module.get_submodule(owner)
        setattr(parent, last, QuantizedLinear(getattr(parent, last), kind, device))
