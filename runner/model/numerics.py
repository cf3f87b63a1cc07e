"""How a model computes, as all stages that run it are told; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from runner.facts import Tree, content, said, values


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """How the model computes; shared by all stages that run it."""

    family: str
    dtype: str
    vae_dtype: str
    mixed_precision: str
    prediction_type: str
    zero_terminal_snr: bool
    noise_schedule: Mapping[str, Any]
    max_token_length: int
    clip_skip: int
    text_width: int
    quantization: str
    text_encoder_quantization: str
    guidance: float | None = None
    """What a distilled denoiser is told as guidance in training."""
    variant: str | None = None
    """What the denoiser is used for, and its window."""
    version: int | None = None
    """The family's version, from its second one on."""
    denoisers: Mapping[str, float] | None = None
    """Denoiser → the timestep from which it is asked, where there are several."""

    def facts(self) -> Tree:
        """What decides results."""
        return {
            "family": said(self.family, "model.family"),
            "version": said(self.version),
            "dtype": said(self.dtype, "model.dtype"),
            "vae_dtype": said(self.vae_dtype, "model.dtype"),
            "mixed_precision": said(self.mixed_precision, "training.mixed_precision"),
            "prediction_type": said(self.prediction_type, "model.prediction_type"),
            "zero_terminal_snr": said(self.zero_terminal_snr, "training.loss.zero_terminal_snr"),
            "noise_schedule": content(self.noise_schedule, "model.checkpoint"),
            "max_token_length": said(self.max_token_length, "model.max_token_length"),
            "clip_skip": said(self.clip_skip, "model.clip_skip"),
            "text_width": content(self.text_width, "model.checkpoint"),
            "quantization": said(self.quantization, "model.quantization"),
            "text_encoder_quantization": said(self.text_encoder_quantization, "model.text_encoder_quantization"),
            "guidance": said(self.guidance, "training.embedded_guidance", "training.raw_embedded_guidance"),
            "variant": said(self.variant, "model.variant", "model.latent_window_size"),
            **({} if self.denoisers is None else {"denoisers": said(self.denoisers, "model")}),
        }

    @cached_property
    def values(self) -> dict[str, Any]:
        found: dict[str, Any] = values(self.facts())
        return found
