"""The half without torch: names, one key of its own in prompts, and what a prompt says to the family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from runner.families.prompts import PromptPart, Readying
from runner.families.sd.spec import SD15
from runner.model.model import Model
from schemas import RunConfig
from schemas.base import Section, key
from schemas.families.variants import VariantModel


class GlowPrompt(Section):
    """What only this family's prompts say."""

    glow: Annotated[float, Field(ge=0, le=10)] | None = key(None, effect="trajectory", stage="sample")
    """How much the picture glows (made_up). Unset: 0."""


def inspect(config: RunConfig, folder: Path) -> Model:
    """A checkpoint of Stable Diffusion 1.5's kind. Raises `ModelProblem`."""
    return replace(SD15.inspect(config, folder), family="made_up", variant=config.model.variant or "")


class GlowPart(PromptPart):
    """The glow is told as guidance."""

    @property
    def keys(self) -> Mapping[str, tuple[str, ...]]:
        return {"guidance": ("glow",)}


def ready(readying: Readying, index: int, options: Any) -> tuple[int, PromptPart | None]:
    """(frames, its part)."""
    return 1, GlowPart(guidance=options.glow) if options.glow is not None else None


MADE_UP = replace(
    SD15,
    name="made_up",
    title="Made-up",
    implementation="made_up_family.model:MADE_UP",
    other_names=("glowing",),
    inspect=inspect,
    variants=("soft", "hard"),
    model_parts=(VariantModel,),
    prompt_parts=(GlowPrompt,),
    ready=ready,
)
