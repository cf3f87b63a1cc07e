"""The half with torch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor

from made_up_family.spec import FINDER
from made_up_family.spec import MADE_UP as SPEC
from runner.families.contract import Conditioning
from runner.families.parts.bundle import bundle
from runner.families.parts.text import load_tokenizers
from runner.families.sd.model import SD15, encode_texts_sd15, process
from runner.families.sd.tiny import write_tiny
from runner.rng import forked


def denoise(denoiser: Any, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """Stable Diffusion 1.5's prediction, brighter by the glow (in thousandths)."""
    told = dict(conditioning)
    glow = told.pop("guidance", None)
    prediction = SD15.denoise(denoiser, x_t, t, told)
    return prediction if glow is None else prediction * (1 + glow.view(-1, 1, 1, 1) / 1000)


def tiny(folder: Path) -> None:
    """Stable Diffusion 1.5's, with a second U-Net of other weights."""
    write_tiny(folder)
    with forked(1, "tiny"):
        second = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        second.save_pretrained(folder / "unet_2")


MADE_UP = bundle(SPEC, FINDER, partial(load_tokenizers, pads={}), encode_texts_sd15, process, denoise, tiny)
