"""From a picture's bytes to pixels: upright, RGB, resized, cropped, mirrored."""

from __future__ import annotations

import hashlib
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from runner.dataset.buckets import View
from runner.errors import RunFailed


class PictureRequest(NamedTuple):
    """One view of one picture to encode."""

    path: str
    digest: str
    view: View

    def pixels(self) -> Tensor:
        """fp32 [3, H, W] in -1..1."""
        return load_pixels(self.path, self.view, self.digest)


def load_pixels(path: str, view: View, digest: str) -> Tensor:
    """fp32 [3, H, W] in -1..1. Raises `RunFailed` where the file is no longer the one that was planned with."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise RunFailed(f"{path} cannot be read any more: {error.strerror}", hint="apply again") from None
    if hashlib.sha256(content).hexdigest() != digest:
        raise RunFailed(
            f"{path} changed while the run was going on", hint="apply again: the plan takes the new content"
        )
    with Image.open(BytesIO(content)) as picture:
        return to_pixels(transformed(picture, view))


def transformed(picture: Image.Image, view: View) -> Image.Image:
    """The picture as the encoder sees it."""
    upright = ImageOps.exif_transpose(picture).convert("RGB")
    if upright.size != view.resized:
        upright = upright.resize(view.resized, Image.Resampling.LANCZOS)
    width, height = view.bucket
    cropped = upright.crop((view.left, view.top, view.left + width, view.top + height))
    return ImageOps.mirror(cropped) if view.flip else cropped


def to_pixels(picture: Image.Image) -> Tensor:
    """fp32 [3, H, W] in -1..1.

    NumPy does the arithmetic: torch's would start a team of OpenMP threads for each reading thread, and from then on
    the teams of all threads together outnumber the cores, which slows every operation of the encoder.
    """
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


def to_picture(pixels: Tensor) -> Image.Image:
    """The reverse, rounded and clipped: [3, H, W] in -1..1 → RGB."""
    values = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy(), "RGB")
