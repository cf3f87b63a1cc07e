"""The forward pass of HunyuanVideo's joint transformer on diffusers' modules, for any batch.

diffusers' own forward takes one vector of frame positions for a whole batch and always builds a mask; here each sample has
its positions and its text length, and no mask is made where all texts are equally long, so that the fused kernels stay.
Text stands behind the picture: positions that are masked are never looked at, so the text is cut to the longest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor
from torch.nn import functional as F

Seen = Tensor | tuple[int, ...] | None
"""Which positions are looked at: a mask [B, N], how many of each sample's (they stand in front), or all."""
Rope = tuple[Tensor, Tensor]
"""Cosines and sines, each [B or 1, N, D] in fp32."""


@dataclass
class Attention:
    """How attention is computed. `split`: one sample after the other, each with its own text length and no mask."""

    eager: bool = False
    split: bool = False


class JointAttention:
    """Attention of both streams (an attention processor of diffusers): normed q and k, turned by position, one softmax."""

    def __init__(self, how: Attention) -> None:
        self.how = how

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Seen = None,
        image_rotary_emb: Rope | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        picture, text, rope = hidden_states, encoder_hidden_states, image_rotary_emb
        assert rope is not None
        if attn.add_q_proj is None:
            q, k, v = _heads(attn, torch.cat([picture, text], dim=1), ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
            length = picture.shape[1]
            q = torch.cat([turned(q[:, :length], rope), q[:, length:]], dim=1)
            k = torch.cat([turned(k[:, :length], rope), k[:, length:]], dim=1)
        else:
            q, k, v = _heads(attn, picture, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
            own = _heads(
                attn, text, ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
            )  # fmt: skip
            q, k, v = (torch.cat(pair, dim=1) for pair in zip((turned(q, rope), turned(k, rope), v), own, strict=True))
        mixed = attend(q, k, v, attention_mask, self.how).to(q.dtype)
        picture, text = mixed[:, : picture.shape[1]], mixed[:, picture.shape[1] :]
        if getattr(attn, "to_out", None) is not None:
            picture = attn.to_out[1](attn.to_out[0](picture))
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return picture, text


def _heads(attn: Any, x: Tensor, layers: tuple[str, ...], norms: tuple[str, str]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (getattr(attn, name)(x).unflatten(2, (attn.heads, -1)) for name in layers)
    return getattr(attn, norms[0])(q).to(v.dtype), getattr(attn, norms[1])(k).to(v.dtype), v


def turned(x: Tensor, rope: Rope) -> Tensor:
    """[B, N, H, D] with each pair of numbers turned by its angle."""
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
    wide = None if mask is None else mask[:, None, None, :]
    if eager:
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        if wide is not None:
            scores = scores.masked_fill(~wide, -torch.inf)
        mixed = scores.float().softmax(-1).to(v.dtype) @ v
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=wide)
    return mixed.transpose(1, 2).flatten(2)


def rope_of(
    positions: Tensor, height: int, width: int, axes: tuple[int, ...], theta: float, scale: float = 1.0
) -> Rope:
    """The angles of [B, T] frame positions on a grid of `height` x `width` patches, in the order of frames, rows, columns.

    `scale` multiplies the positions of rows and columns (RoPE scaling of one-frame inference).
    """
    device = positions.device
    rows = torch.arange(height, dtype=torch.float32, device=device) * scale
    columns = torch.arange(width, dtype=torch.float32, device=device) * scale
    batch, frames = positions.shape
    grid = (
        positions.float()[:, :, None, None].expand(batch, frames, height, width),
        rows[None, None, :, None].expand(batch, frames, height, width),
        columns[None, None, None, :].expand(batch, frames, height, width),
    )
    angles = []
    for size, place in zip(axes, grid, strict=True):
        speeds = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32, device=device)[: size // 2] / size)
        angles.append((place.flatten(1)[..., None] * speeds).repeat_interleave(2, dim=-1))
    joined = torch.cat(angles, dim=-1)
    return joined.cos(), joined.sin()


def refined_text(model: Any, text: Tensor, mask: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """([B, L, D] tokens, their mask [B, L]): cut to the longest text of the batch, then through the token refiner."""
    mask = mask.bool()
    length = max(1, int(mask.sum(1).max()))
    text, mask = text[:, :length], mask[:, :length]
    return model.context_embedder(text, timestep, mask), mask


def joint_blocks(model: Any, picture: Tensor, text: Tensor, mask: Tensor, temb: Tensor, rope: Rope) -> Tensor:
    """Both kinds of blocks; the picture's tokens. `mask` [B, L] of the text; None is handed on where it hides nothing."""
    whole: Seen = None
    if not bool(mask.all()):
        whole = torch.cat([mask.new_ones(mask.shape[0], picture.shape[1]), mask], dim=1)
        if model.how.split:  # counted once: the device is waited for
            whole = tuple(whole.sum(1).tolist())
    call: Callable[..., Any] = lambda block, *given: block(*given)  # noqa: E731
    if torch.is_grad_enabled() and model.gradient_checkpointing:
        call = model._gradient_checkpointing_func
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        picture, text = call(block, picture, text, temb, whole, rope)
    return picture


def unpatched(model: Any, tokens: Tensor, frames: int, height: int, width: int) -> Tensor:
    """[B, frames * height * width, patch volume * C] → [B, C, T, H, W]."""
    p, p_t = model.config.patch_size, model.config.patch_size_t
    grid = tokens.reshape(tokens.shape[0], frames, height, width, -1, p_t, p, p)
    return grid.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def set_attention(model: Any, how: Attention) -> None:
    """Puts the joint attention into all blocks."""
    model.how = how
    for kind in ("transformer_blocks", "single_transformer_blocks"):
        for block in getattr(model, kind):
            block.attn.set_processor(JointAttention(how))


class HunyuanVideoTransformer(HunyuanVideoTransformer3DModel):
    """HunyuanVideo's transformer for batches of any text lengths. The weights are those of diffusers' class; a new one
    needs `set_attention`."""

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, text: Tensor, mask: Tensor, pooled: Tensor, guidance: Tensor
    ) -> Tensor:
        """x [B, C, T, H, W], timestep [B] (0..1000), text [B, L, D] with its mask [B, L], pooled [B, P], guidance [B]
        (1000 times the scale) → the velocity, of x's shape."""
        frames, height, width = hidden_states.shape[2:]
        p, p_t = self.config.patch_size, self.config.patch_size_t
        frames, height, width = frames // p_t, height // p, width // p
        positions = torch.arange(frames, device=hidden_states.device)[None]
        rope = rope_of(positions, height, width, tuple(self.config.rope_axes_dim), self.config.rope_theta)
        temb, _ = self.time_text_embed(timestep, pooled, guidance)
        tokens, mask = refined_text(self, text, mask, timestep)
        picture = joint_blocks(self, self.x_embedder(hidden_states), tokens, mask, temb, rope)
        return unpatched(self, self.proj_out(self.norm_out(picture, temb)), frames, height, width)
