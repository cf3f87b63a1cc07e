"""Pictures to latents and back through AutoencoderKL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def encode_images(vae: Any, pixels: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
    """Latents in the denoiser's scale, (z - shift) * factor; the distribution's mode, or one sample per picture from its
    own generator."""
    distribution = vae.encode(pixels).latent_dist
    latents = distribution.mode()
    if generators is not None:
        noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
        latents = distribution.mean + distribution.std * noise.to(latents.device, latents.dtype)
    scaled: Tensor = (latents - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor
    return scaled


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Pixels in -1..1 (not clipped)."""
    dtype = next(vae.parameters()).dtype
    pixels: Tensor = vae.decode(
        (latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)).to(dtype)
    ).sample
    return pixels


def tile(vae: Any, side: int | None, strip: int | None) -> None:
    """Has it work in overlapping tiles of `side` pixels; None: on whole pictures. It has nothing that strips would cut."""
    if side is not None:
        vae.enable_tiling()
        vae.tile_sample_min_size = side
        vae.tile_latent_min_size = side // 2 ** (len(vae.config.block_out_channels) - 1)
