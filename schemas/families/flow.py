"""Keys of families that follow a flow, some of them distilled, some with a language model as their text encoder."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from schemas.base import Section, Text, key


class FlowPrompt(Section):
    """Of families whose sampler moves its noise levels."""

    flow_shift: Annotated[float, Field(gt=0, le=100)] | None = key(None, effect="trajectory", stage="sample")
    """Moves the sampler's noise levels towards noise (sd3, flux1, chroma, hunyuan_video, framepack). Unset: by family (hunyuan_video: by the number of steps; flux1, framepack: by the size)."""


class GuidancePrompt(Section):
    """Of families whose denoiser is told the guidance."""

    embedded_guidance: Annotated[float, Field(ge=0, le=100)] | None = key(None, effect="trajectory", stage="sample")
    """Guidance that a distilled denoiser is told. Unset: by family (flux1: 3.5, kontext 2.5; hunyuan_video: 6, framepack: 10)."""


class SystemPrompt(Section):
    """Of families whose text encoder is told what to do with the prompt."""

    custom_system_prompt: Text | None = key(None, effect="trajectory", stage="sample", min_length=1)
    """Replaces what LLaMA is told to do with the prompt (hunyuan_video, framepack)."""
