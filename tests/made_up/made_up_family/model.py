"""The half with torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from made_up_family.spec import FINDER, BrightItem
from made_up_family.spec import MADE_UP as SPEC
from runner.families.contract import Conditioning, Shown
from runner.families.parts.bundle import bundle
from runner.families.parts.text import load_tokenizers
from runner.families.sd.model import SD15, encode_texts_sd15, process
from runner.families.sd.tiny import write_tiny
from runner.rng import forked


def conditioning(shown: Shown, encoding: Mapping[str, Tensor]) -> Conditioning:
    """How bright it is; pictures are made as bright as they are."""
    own = shown.own
    return {"brightness": torch.tensor(own.brightness if isinstance(own, BrightItem) else 1.0)}


def denoise(denoiser: Any, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """Stable Diffusion 1.5's prediction, as bright as it is told and brighter by the glow (in thousandths)."""
    told = dict(conditioning)
    glow, brightness = told.pop("guidance", None), told.pop("brightness")
    prediction = SD15.denoise(denoiser, x_t, t, told) * brightness.view(-1, 1, 1, 1)
    return prediction if glow is None else prediction * (1 + glow.view(-1, 1, 1, 1) / 1000)


def tiny(folder: Path) -> None:
    """Stable Diffusion 1.5's, with a second U-Net of other weights."""
    write_tiny(folder)
    with forked(1, "tiny"):
        second = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        second.save_pretrained(folder / "unet_2")


MADE_UP = bundle(
    SPEC,
    FINDER,
    partial(load_tokenizers, pads={}),
    encode_texts_sd15,
    process,
    denoise,
    tiny,
    conditioning=conditioning,
)
