"""The half without torch: two denoisers with a boundary, keys of its own in [model], in prompts and in sources, and what
prompts and items say to the family."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from runner.dataset.parts import Found, ItemPart, Piece
from runner.families.identify import FileNames, Kind
from runner.families.parts.memory import DenoiserMemory, predict
from runner.families.parts.part import Naming
from runner.families.parts.targets import Adaptable, Names, Preset
from runner.families.prompts import PromptPart, Readying
from runner.families.sd.memory import forward, saved
from runner.families.sd.spec import SD15, SD15_FINDER
from runner.model.model import Denoiser, Model
from schemas import RunConfig
from schemas.base import FilePath, Section, key
from schemas.families.variants import VariantModel

BOUNDARY = 500
"""The timestep from which the first denoiser is asked; below it, the second one is."""


class LowNoiseModel(Section):
    """What only this family's [model] says."""

    low_noise: FilePath | None = key(None, effect="none")
    """Another denoiser for little noise than the checkpoint's: a file or a directory (made_up)."""

    boundary: Annotated[int, Field(ge=1, le=999)] | None = key(None, effect="trajectory", stage=("train", "sample"))
    """The timestep below which the denoiser for little noise is asked (made_up). Unset: 500."""


class GlowPrompt(Section):
    """What only this family's prompts say."""

    glow: Annotated[float, Field(ge=0, le=10)] | None = key(None, effect="trajectory", stage="sample")
    """How much the picture glows (made_up). Unset: 0."""


class BrightSource(Section):
    """What only this family's sources say."""

    brightness: Annotated[float, Field(ge=0, le=10)] | None = key(None, effect="trajectory", stage="train")
    """How bright the pictures of a source are (made_up), which the denoiser is told. Unset: 1."""


UNET = next(part for part in SD15_FINDER.parts if part.name == "denoiser")
FINDER = replace(
    SD15_FINDER,
    family="made_up",
    title="Made-up",
    parts=(
        *SD15_FINDER.parts,
        replace(
            UNET,
            name="denoiser_2",
            folder="unet_2",
            namings=(Naming("", "diffusers"), Naming("low_noise_model."), Naming("")),
            key=("model", "low_noise"),
            same_as=UNET.folder,
        ),
    ),
)
ADAPTABLE = Adaptable(
    parts=tuple(part for part in FINDER.parts if part.name != "vae"),
    names={
        "denoiser": Names(kohya="lora_unet_", diffusers="unet."),
        "denoiser_2": Names(kohya="lora_unet_2_", diffusers="unet_2."),
        "text_encoder_1": Names(kohya="lora_te_text_model_", diffusers="text_encoder.text_model."),
    },
    presets={"default": Preset(re.compile(r"\.attn[12]\.(to_q|to_k|to_v|to_out\.0)$"))},
    example="down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
)


def inspect(config: RunConfig, folder: Path) -> Model:
    """A checkpoint of Stable Diffusion 1.5's kind with one more U-Net. Raises `ModelProblem`."""
    own: Any = config.model
    model, (_, components) = SD15.inspect(config, folder), FINDER.components(config, folder)
    denoisers = Denoiser("denoiser", own.boundary or BOUNDARY), Denoiser("denoiser_2")
    variant = config.model.variant or ""
    return replace(model, family="made_up", components=components, denoisers=denoisers, variant=variant)


def derived(model: Model) -> Mapping[str, Any]:
    return {"model.boundary": int(model.denoisers[0].low)}


class GlowPart(PromptPart):
    """The glow is told as guidance."""

    @property
    def keys(self) -> Mapping[str, tuple[str, ...]]:
        return {"guidance": ("glow",)}


def ready(readying: Readying, index: int, options: Any) -> tuple[int, PromptPart | None]:
    """(frames, its part)."""
    return 1, GlowPart(guidance=options.glow) if options.glow is not None else None


@dataclass(frozen=True, kw_only=True)
class BrightItem(ItemPart):
    """How bright an item is."""

    brightness: float

    def facts(self) -> Mapping[str, Any]:
        return {"brightness": self.brightness}


def items(model: Model, found: Found) -> list[Piece]:
    """The whole of it; how bright it is stands in its source."""
    return [Piece(found.clip, BrightItem(brightness=found.said.get("brightness", 1.0)))]


def recognise(file: FileNames) -> Kind | None:
    """Its files are Stable Diffusion 1.5's, with a mark."""
    return Kind("a made-up checkpoint", "made_up") if file.has("made_up.mark") else None


MADE_UP = replace(
    SD15,
    name="made_up",
    title="Made-up",
    implementation="made_up_family.model:MADE_UP",
    other_names=("glowing",),
    recognise=recognise,
    inspect=inspect,
    derived=derived,
    targets=ADAPTABLE.targets,
    layers=ADAPTABLE.layers,
    memory=partial(predict, DenoiserMemory(parts=FINDER.parts, saved=saved, forward=forward)),
    blocks=FINDER.blocks,
    variants=("soft", "hard"),
    model_parts=(VariantModel, LowNoiseModel),
    prompt_parts=(GlowPrompt,),
    ready=ready,
    source_parts=(BrightSource,),
    items=items,
)
