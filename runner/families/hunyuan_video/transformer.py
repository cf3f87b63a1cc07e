"""The forward pass of HunyuanVideo's joint transformer on diffusers' modules, for any batch.

diffusers' own forward takes one vector of frame positions for a whole batch and always builds a mask; here each sample has
its positions and its text length, and no mask is made where all texts are equally long, so that the fused kernels stay.
Text stands behind the picture: positions that are masked are never looked at, so the text is cut to the longest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor

from runner.families.parts.attention import Rope, Seen


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
    """([B, L, D] tokens, their mask [B, L]): cut to the longest text of the batch, then through the token refiner. Masks are
    on the host, so that no forward pass waits for the device to learn how long its texts are."""
    mask = mask.bool()
    length = max(1, int(mask.sum(1).max()))
    text, mask = text[:, :length], mask[:, :length]
    return model.context_embedder(text, timestep, mask.to(text.device, non_blocking=True)), mask


def joint_blocks(model: Any, picture: Tensor, text: Tensor, mask: Tensor, temb: Tensor, rope: Rope) -> Tensor:
    """Both kinds of blocks; the picture's tokens. `mask` [B, L] of the text, on the host; None is handed on where it hides
    nothing."""
    whole: Seen = None
    if not bool(mask.all()):
        seen = torch.cat([mask.new_ones(mask.shape[0], picture.shape[1]), mask], dim=1)
        whole = tuple(seen.sum(1).tolist()) if model.how.split else seen.to(picture.device, non_blocking=True)
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


class HunyuanVideoTransformer(HunyuanVideoTransformer3DModel):
    """HunyuanVideo's transformer for batches of any text lengths. The weights are those of diffusers' class; a new one
    needs `set_attention`."""

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, text: Tensor, mask: Tensor, pooled: Tensor, guidance: Tensor
    ) -> Tensor:
        """x [B, C, T, H, W], timestep [B] (0..1000), text [B, L, D] with its mask [B, L] (on the host), pooled [B, P], guidance [B]
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
