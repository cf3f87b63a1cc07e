"""[sampling]: the pictures made while training and for the strip."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from schemas.base import FilePath, Section, Steps, Text, key
from schemas.families.flow import FlowPrompt, GuidancePrompt, SystemPrompt
from schemas.families.framepack import SectionsPrompt
from schemas.families.references import ReferencesPrompt
from schemas.families.video import VideoPrompt

Sampler = Literal[
    "ddim",
    "ddpm",
    "euler",
    "euler_a",
    "heun",
    "lms",
    "pndm",
    "unipc",
    "dpm2",
    "dpm2_a",
    "dpm++_2m",
    "dpm++_2m_karras",
    "dpm++_sde",
    "dpm++_sde_karras",
]


class CommonOptions(Section):
    """Keys of a prompt that every family has."""

    negative_prompt: Text | None = key(None, effect="trajectory", stage="sample")
    """What the picture should not show."""

    width: int | None = key(None, effect="trajectory", stage="sample", ge=8, le=8192)
    """Width in pixels, rounded down to a multiple of 8. Unset: by family (sd15: 512)."""

    height: int | None = key(None, effect="trajectory", stage="sample", ge=8, le=8192)
    """Height in pixels, rounded down to a multiple of 8. Unset: by family (sd15: 512)."""

    num_inference_steps: int | None = key(None, effect="trajectory", stage="sample", ge=1, le=1000)
    """Steps of the sampler. Unset: by family (sd15: 30)."""

    cfg_scale: Annotated[float, Field(ge=0, le=100)] | None = key(None, effect="trajectory", stage="sample")
    """Guidance scale; 1 is off. Unset: by family (sd15: 7.5)."""

    sampler: Sampler | None = key(None, effect="trajectory", stage="sample")
    """The sampler's name. Unset: by family (sd15: ddim)."""


class PromptOptions(
    ReferencesPrompt, SectionsPrompt, SystemPrompt, FlowPrompt, GuidancePrompt, VideoPrompt, CommonOptions
):
    """Keys of a prompt that [sampling] may set for all of them. Which of them a family has, it says itself."""


class Prompt(PromptOptions):
    """One picture or video to make: [[sampling.prompts]]."""

    prompt: Text = key(effect="trajectory", stage="sample")
    """What the picture shows."""

    seed: int | None = key(None, effect="trajectory", stage="sample", ge=-1, le=2**63 - 1)
    """Seed of the noise. Unset: derived from the run's seed and the prompt's place. -1: drawn once, when the run is first applied, and recorded."""


class Sampling(PromptOptions):
    """The pictures made while training and for the strip."""

    every_n_steps: Steps | None = key(None, effect="none")
    """Makes the pictures each n steps while training."""

    every_n_epochs: Steps | None = key(None, effect="none")
    """Makes the pictures each n epochs while training."""

    at_first: bool = key(False, effect="none")
    """Makes them before the first step too."""

    prompt_file: FilePath | None = key(None, effect="none")
    """A .txt, .toml or .json file of prompts; they come before those of [[sampling.prompts]]."""

    dialect: Literal["kohya", "musubi", "framepack"] | None = key(None, effect="trajectory", stage="sample")
    """What the letters of options in a .txt prompt file mean. Unset: by family (sd15: kohya; hunyuan_video, framepack: musubi)."""

    vae_chunk_size: int | None = key(None, effect="bits", stage="sample", ge=8, le=1024)
    """Decodes videos with convolutions in strips so many numbers wide: less memory, the same result. Unset: as caching.vae_chunk_size."""

    blocks_to_swap: int | None = key(None, effect="none", ge=0, le=10_000)
    """So many of the denoiser's blocks wait in the host's memory while `runner sample` makes pictures. Unset: as training.memory.blocks_to_swap."""

    vae_tile_size: int | None = key(None, effect="trajectory", stage="sample", ge=64, le=8192, multiple_of=8)
    """Decodes samples larger than this in overlapping tiles of so many pixels on a side. Unset: as caching.vae_tile_size."""

    prompt_weighting: bool = key(False, effect="trajectory", stage="sample")
    """Reads `(word:1.2)` and `[word]` in prompts as weights, as AUTOMATIC1111's web UI does. Off: taken literally."""

    prompts: list[Prompt] = key(default_factory=list, effect="none", max_length=10_000)
    """The pictures: [[sampling.prompts]]."""
