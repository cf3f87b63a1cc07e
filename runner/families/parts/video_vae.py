"""Videos to latents and back through AutoencoderKLHunyuanVideo; stills are videos of one frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from runner.core.chunked import chunk_convolutions
from runner.families.contract import LoadOptions
from runner.families.parts.autoencode import encode_images as encode


def encode_images(vae: Any, pixels: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
    """[B, 3, T, H, W] or [B, 3, H, W] in -1..1 → latents [B, C, t, h, w] in the denoiser's scale."""
    return encode(vae, pixels if pixels.dim() == 5 else pixels[:, :, None], generators)


def whole_clips(vae: Any, options: LoadOptions) -> None:
    """Has it see a clip as a whole: pieces of time would be other numbers."""
    vae.use_framewise_encoding = vae.use_framewise_decoding = False


def tile(vae: Any, side: int | None, strip: int | None) -> None:
    """Has it work in overlapping tiles of `side` pixels, None: on whole frames; and compute its convolutions in strips."""
    if strip is not None:
        chunk_convolutions(vae, strip)
    if side is not None:
        vae.enable_tiling(side, side, None, side * 3 // 4, side * 3 // 4)
