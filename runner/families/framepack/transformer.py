"""FramePack's transformer (arXiv 2504.12626) on diffusers' modules: clean frames in three resolutions stand before the
frames that are denoised, and an image's embedding before the text. Batches may mix frame positions and text lengths, and
any of the clean frames may be left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional as F

from runner.core.precision import full_precision
from runner.families.framepack.architecture import HISTORY
from runner.families.hunyuan_video.transformer import joint_blocks, refined_text, rope_of, unpatched
from runner.families.parts.attention import Rope


@dataclass(frozen=True)
class Clean:
    """Frames that are known: latents [B, C, N, H, W] and their positions [B, N]."""

    latents: Tensor
    positions: Tensor


class FramepackTransformer(HunyuanVideoFramepackTransformer3DModel):
    """FramePack's transformer. The weights are those of diffusers' class; a new one needs `set_attention`."""

    rope_scale: float = 1.0
    """Factor of the positions of rows and columns; whoever samples sets it for each timestep."""

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        text: Tensor,
        mask: Tensor,
        pooled: Tensor,
        guidance: Tensor,
        image: Tensor,
        positions: Tensor,
        clean: Clean,
        clean_2x: Clean | None = None,
        clean_4x: Clean | None = None,
    ) -> Tensor:
        """x [B, C, T, H, W] at `positions` [B, T], timestep [B] (0..1000), text [B, L, D] with its mask [B, L] (on the
        host), pooled [B, P], guidance [B] (1000 times the scale), image [B, M, V] (SigLIP's) → the velocity, of x's shape, in fp32."""
        frames, height, width = hidden_states.shape[2], hidden_states.shape[3] // 2, hidden_states.shape[4] // 2
        tokens, rope = self._sequence(hidden_states, positions, (clean, clean_2x, clean_4x))
        temb, _ = self.time_text_embed(timestep, pooled, guidance)
        words, mask = refined_text(self, text, mask, timestep)
        seen = self.image_projection(image)
        words = torch.cat([seen, words], dim=1)
        mask = torch.cat([mask.new_ones(mask.shape[0], seen.shape[1]), mask], dim=1)
        picture = joint_blocks(self, tokens, words, mask, temb, rope)[:, -frames * height * width :]
        return unpatched(self, self._projected(self.norm_out(picture, temb)), frames, height, width)

    def _sequence(self, x: Tensor, positions: Tensor, known: tuple[Clean | None, ...]) -> tuple[Tensor, Rope]:
        """Tokens and their angles: [4x, 2x, clean, denoised]."""
        config: Any = self.config
        height, width = x.shape[3] // 2, x.shape[4] // 2

        def angles(at: Tensor) -> Rope:
            return rope_of(at, height, width, tuple(config.rope_axes_dim), config.rope_theta, self.rope_scale)

        tokens, ropes = [self.x_embedder(x)], [angles(positions)]
        for (name, coarse), frames in zip(HISTORY, known, strict=True):
            if frames is None or frames.latents.shape[2] == 0:
                continue
            kernel = (coarse, 2 * coarse, 2 * coarse)
            embedder: nn.Module = getattr(self.clean_x_embedder, name)
            tokens.insert(0, embedder(padded(frames.latents.to(x.dtype), kernel)).flatten(2).transpose(1, 2))
            ropes.insert(0, _pooled(angles(frames.positions), frames.positions.shape[1], height, width, coarse))
        cos, sin = (torch.cat([rope[part] for rope in ropes], dim=1) for part in (0, 1))
        return torch.cat(tokens, dim=1), (cos, sin)

    def _projected(self, tokens: Tensor) -> Tensor:
        """The last layer, in fp32 whatever the others compute in."""
        layer = self.proj_out
        if type(layer) is not nn.Linear:  # it carries an adapter
            wide: Tensor = layer(tokens)
            return wide.float()
        with full_precision(tokens.device):
            return F.linear(tokens.float(), layer.weight.float(), layer.bias.float())


def padded(x: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """[…, T, H, W] continued at its ends with its last values up to multiples of the kernel."""
    sides = [(-x.shape[-3 + axis]) % kernel[axis] for axis in range(3)]
    if not any(sides):
        return x
    return F.pad(x, (0, sides[2], 0, sides[1], 0, sides[0]), mode="replicate")


def _pooled(rope: Rope, frames: int, height: int, width: int, coarse: int) -> Rope:
    """The angles' cosines and sines of fine positions, averaged to coarse ones."""
    if coarse == 1:
        return rope

    def pool(x: Tensor) -> Tensor:
        grid = x.transpose(1, 2).unflatten(2, (frames, height, width))
        return F.avg_pool3d(padded(grid, (coarse,) * 3), coarse).flatten(2).transpose(1, 2)

    return pool(rope[0]), pool(rope[1])
