"""The key of families whose checkpoints are of several uses, which no header tells."""

from __future__ import annotations

from typing import Literal

from schemas.base import Section, key


class VariantModel(Section):
    """Which of a family's models it is."""

    variant: Literal["i2v", "f1", "one_frame", "dev", "schnell", "kontext"] | None = key(
        None, effect="trajectory", stage=("train", "sample")
    )
    """Which FramePack: i2v makes the last section of a video first, f1 goes forward (and is another checkpoint), one_frame makes one picture from others; unset: i2v. Which FLUX.1: dev, schnell or kontext; unset: by the checkpoint's keys, its model_index.json and its name."""
