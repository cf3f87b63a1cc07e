"""Videos to latents and back through AutoencoderKLHunyuanVideo; stills are videos of one frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from runner.families.parts.autoencode import encode_images as encode


def encode_images(vae: Any, pixels: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
    """[B, 3, T, H, W] or [B, 3, H, W] in -1..1 → latents [B, C, t, h, w] in the denoiser's scale."""
    return encode(vae, pixels if pixels.dim() == 5 else pixels[:, :, None], generators)
