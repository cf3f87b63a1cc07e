"""Attention of transformers with two streams, and the plain formula in place of PyTorch's kernel, for every class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models import attention_processor as kinds
from torch import Tensor, nn
from torch.nn import functional as F

Seen = Tensor | tuple[int, ...] | None
"""Which positions are looked at: a mask, bool [B, N] or [B, 1, N, N], how many of each sample's (they stand in front), or
all."""
Rope = tuple[Tensor, Tensor]
"""Cosines and sines, each [B or 1, N, D] in fp32."""


@dataclass
class Attention:
    """How attention is computed. `split`: one sample after the other, each with its own text length and no mask."""

    eager: bool = False
    split: bool = False


class JointAttention:
    """Attention of both streams, or of one (an attention processor of diffusers): normed q and k, turned by position where
    there are angles, one softmax."""

    def __init__(self, how: Attention) -> None:
        self.how = how

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Seen = None,
        image_rotary_emb: Rope | None = None,
    ) -> Any:
        picture, text, rope = hidden_states, encoder_hidden_states, image_rotary_emb
        length = picture.shape[1]
        if text is not None and attn.add_q_proj is None:
            q, k, v = _heads(attn, torch.cat([picture, text], dim=1), ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
            q = torch.cat([turned(q[:, :length], rope), q[:, length:]], dim=1)
            k = torch.cat([turned(k[:, :length], rope), k[:, length:]], dim=1)
        else:
            q, k, v = _heads(attn, picture, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
            q, k = turned(q, rope), turned(k, rope)
            if text is not None:
                own = _heads(attn, text, ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"))
                q, k, v = (torch.cat(pair, dim=1) for pair in zip((q, k, v), own, strict=True))
        mixed = attend(q, k, v, attention_mask, self.how).to(q.dtype)
        picture, rest = mixed[:, :length], mixed[:, length:]
        if getattr(attn, "to_out", None) is not None:
            picture = attn.to_out[1](attn.to_out[0](picture))
        if text is None:
            return picture
        if getattr(attn, "to_add_out", None) is not None:
            rest = attn.to_add_out(rest)
        return picture, rest


class TextFirst:
    """Attention of FLUX.1's kind (an attention processor of diffusers): text stands before the picture, and angles are for
    both."""

    def __init__(self, how: Attention) -> None:
        self.how = how

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        seen: Tensor | None = None,
    ) -> Any:
        """`seen`: which positions are looked at, bool [B, N]."""
        text = encoder_hidden_states
        q, k, v = _heads(attn, hidden_states, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        if text is not None:
            own = _heads(attn, text, ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"))
            q, k, v = (torch.cat(pair, dim=1) for pair in zip(own, (q, k, v), strict=True))
        rope = None if image_rotary_emb is None else (image_rotary_emb[0][None], image_rotary_emb[1][None])
        mask = attention_mask if seen is None else seen
        mixed = attend(turned(q, rope), turned(k, rope), v, mask, self.how).to(q.dtype)
        if text is None:
            return mixed
        rest, picture = mixed.split_with_sizes([text.shape[1], mixed.shape[1] - text.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](picture)), attn.to_add_out(rest)


def _heads(attn: Any, x: Tensor, layers: tuple[str, ...], norms: tuple[str, str]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (getattr(attn, name)(x).unflatten(2, (attn.heads, -1)) for name in layers)
    norm_q, norm_k = (getattr(attn, name) for name in norms)
    return (q if norm_q is None else norm_q(q).to(v.dtype)), (k if norm_k is None else norm_k(k).to(v.dtype)), v


def turned(x: Tensor, rope: Rope | None) -> Tensor:
    """[B, N, H, D] with each pair of numbers turned by its angle."""
    if rope is None:
        return x
    cos, sin = (part.unsqueeze(2) for part in rope)
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (x.float() * cos + across.float() * sin).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Seen, how: Attention) -> Tensor:
    """[B, N, H, D] each → [B, N, H * D]."""
    if isinstance(mask, tuple):
        rows = []
        for row, length in enumerate(mask):
            own = slice(row, row + 1)
            one = _attend(q[own, :length], k[own, :length], v[own, :length], None, how.eager)
            rows.append(F.pad(one, (0, 0, 0, q.shape[1] - length)))
        return torch.cat(rows)
    return _attend(q, k, v, mask, how.eager)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, eager: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    wide = mask[:, None, None, :] if mask is not None and mask.dim() == 2 else mask
    if eager:
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        if wide is not None:
            scores = scores.masked_fill(~wide, -torch.inf)
        mixed = scores.float().softmax(-1).to(v.dtype) @ v
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=wide)
    return mixed.transpose(1, 2).flatten(2)


def set_attention(model: Any, how: Attention) -> None:
    """Puts the joint attention into all blocks of a transformer."""
    model.how = how
    for kind in ("transformer_blocks", "single_transformer_blocks"):
        for block in getattr(model, kind):
            block.attn.set_processor(JointAttention(how))


def transformers_attention(module: Any, how: Attention) -> None:
    """`ModuleClass.attention` of a class of transformers."""
    if how.eager:
        module.set_attn_implementation("eager")


def diffusers_attention(module: nn.Module, how: Attention) -> None:
    """`ModuleClass.attention` of a class of diffusers whose attention is of one kind."""
    if how.eager:
        _plain(module, kinds.AttnProcessor2_0, kinds.AttnProcessor())


def joint_attention(module: nn.Module, how: Attention) -> None:
    """The same of Stable Diffusion 3's transformer."""
    if how.eager:
        _plain(module, kinds.JointAttnProcessor2_0, JointAttention(how))


def text_first_attention(module: nn.Module, how: Attention) -> None:
    """The same of FLUX.1's transformer."""
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    if how.eager:
        _plain(module, FluxAttnProcessor, TextFirst(how))


def two_stream_attention(module: nn.Module, how: Attention) -> None:
    """The same of HunyuanVideo's and FramePack's transformer. A token refiner's masks are bool, which diffusers' plain
    processor does not take."""
    set_attention(module, how)
    if how.eager:
        _plain(module, kinds.AttnProcessor2_0, JointAttention(Attention(eager=True)))


def _plain(module: nn.Module, fast: type, plain: Any) -> None:
    """Puts the plain formula in the place of PyTorch's kernel. Every attention must be of a kind that has one."""
    for name, part in module.named_modules():
        processor: Any = getattr(part, "processor", None)
        if isinstance(processor, fast):
            part.set_processor(plain)
        elif processor is not None and not isinstance(processor, (kinds.AttnProcessor, JointAttention, TextFirst)):
            raise TypeError(f"{name}: nothing says how {type(processor).__name__} computes the plain formula")
