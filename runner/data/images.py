"""From a picture's bytes to pixels: upright, RGB, resized, cropped, mirrored."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from runner.dataset.buckets import Fit, Size, View, cover
from runner.dataset.clips import Clip
from runner.dataset.encodings import Mask, TrainItem
from runner.dataset.parts import ItemPart
from runner.errors import RunFailed
from runner.files import read_bytes
from runner.pictures import GROUND, MOST_BYTES, alpha_of, as_rgb, has_alpha, read_picture


class PictureRequest(NamedTuple):
    """One view of one picture or clip to encode."""

    path: str
    digest: str
    view: View
    mask: Mask | None = None
    clip: Clip | None = None
    own: ItemPart | None = None

    @classmethod
    def of(cls, item: TrainItem, view: View) -> PictureRequest:
        return cls(item.path, item.digest, view, item.mask, item.clip, item.own)

    def pixels(self) -> Tensor:
        """fp32 [3, H, W] in -1..1, of a clip [3, T, H, W]. Raises `RunFailed` where the file is no longer the one that
        was planned with."""
        if self.clip is not None:
            from runner.data.videos import read_clip

            return read_clip(self.path, self.digest, self.clip, self.view)
        masked = self.mask is not None and self.mask.path is None
        return to_pixels(transformed(_known(self.path, self.digest), self.view, None if masked else GROUND))

    def mask_pixels(self) -> Tensor:
        """fp32 [1, H, W] in 0..1: how much of the loss counts."""
        assert self.mask is not None
        own = self.mask.path is None
        picture = _known(self.path, self.digest) if own else _known(self.mask.path or "", self.mask.digest)
        return to_mask(picture, self.view, own)

    def sized_pictures(self) -> list[Tensor]:
        """fp32 [3, H, W] in -1..1 of each picture that is encoded with it, resized whole; mirrored where it is."""
        if self.own is None:
            return []
        return [
            reference_pixels(beside.path or "", beside.digest, size, self.view.flip)
            for beside, size in zip(self.own.pictures, self.own.sizes, strict=True)
        ]

    def fitted_pictures(self) -> list[tuple[Tensor, Tensor | None]]:
        """(fp32 [3, H, W] in -1..1, its transparency [1, H, W] in 0..1 where it has any) of each picture that is encoded
        with it, resized and cropped like it."""
        found = []
        for beside in self.own.pictures if self.own is not None else ():
            assert beside.path is not None
            picture = _known(beside.path, beside.digest)
            fit = Fit(self.view.bucket, cover(picture.size, self.view.bucket), picture.size, self.view.area)
            same = fit.resized == self.view.resized  # then it is cropped at the same place
            view = self.view if same else replace(fit.centre, flip=self.view.flip)
            alpha = to_mask(picture, view, True) if has_alpha(picture) else None
            found.append((to_pixels(transformed(picture, view, None)), alpha))
        return found


def reference_pixels(path: str, digest: str, size: Size, flip: bool = False) -> Tensor:
    """fp32 [3, H, W] in -1..1 of a picture that is resized whole, as the pipelines of edit models do. Raises `RunFailed`
    where the file is no longer the one that was planned with."""
    picture = as_rgb(_known(path, digest), GROUND)
    shown = picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
    return to_pixels(ImageOps.mirror(shown) if flip else shown)


def _known(path: str, digest: str) -> Image.Image:
    """The picture with which was planned. Raises `RunFailed` where it is another one by now."""
    try:
        content = read_bytes(path, MOST_BYTES)
    except OSError as error:
        raise RunFailed(f"{path} cannot be read any more: {error.strerror}", hint="apply again") from None
    if hashlib.sha256(content).hexdigest() != digest:
        raise RunFailed(
            f"{path} changed while the run was going on", hint="apply again: the plan takes the new content"
        )
    return read_picture(content)


def to_mask(picture: Image.Image, view: View, transparency: bool) -> Tensor:
    """fp32 [1, H, W] in 0..1 from a picture's transparency, or from the brightness of its red channel."""
    channel = alpha_of(picture) if transparency else as_rgb(picture, "black").getchannel("R")
    shown = transformed(channel.convert("RGB"), replace(view, hue=0, gamma=100))
    return torch.from_numpy(np.asarray(shown.getchannel(0), dtype=np.float32) / 255)[None]


def transformed(picture: Image.Image, view: View, ground: str | None = GROUND) -> Image.Image:
    """An upright picture as the encoder sees it; `ground` stands behind transparent pixels."""
    upright = as_rgb(picture, ground)
    if upright.size != view.resized:
        smaller = view.area and view.resized[0] < upright.width
        upright = upright.resize(view.resized, Image.Resampling.BOX if smaller else Image.Resampling.LANCZOS)
    width, height = view.bucket
    cropped = upright.crop((view.left, view.top, view.left + width, view.top + height))
    return _coloured(ImageOps.mirror(cropped) if view.flip else cropped, view)


def _coloured(picture: Image.Image, view: View) -> Image.Image:
    """With the hue turned and the gamma changed, where the view says so."""
    if view.hue:
        hue, saturation, value = picture.convert("HSV").split()
        turn = round(view.hue * 256 / 360)
        hue = hue.point([(level + turn) % 256 for level in range(256)])
        picture = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    if view.gamma != 100:
        table = [round(255 * (level / 255) ** (view.gamma / 100)) for level in range(256)]
        picture = picture.point(table * 3)
    return picture


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
