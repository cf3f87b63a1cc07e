"""[sampling]: the pictures made while training and for the strip."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from schemas.base import FilePath, Section, Steps, Text, key

Sampler = Literal[
    "ddim", "ddpm", "euler", "euler_a", "heun", "lms", "pndm", "unipc", "dpm2", "dpm2_a",
    "dpm++_2m", "dpm++_2m_karras", "dpm++_sde", "dpm++_sde_karras",
]  # fmt: skip


Size = Annotated[int, Field(ge=0, le=1000)]


class OneFrameInference(Section):
    """One-frame inference of FramePack: where the made frame and the control images stand in time."""

    target_index: Size | None = key(None, effect="trajectory", stage="sample")
    """Position of the made picture. Unset: model.latent_window_size."""

    control_index: Annotated[list[Size], Field(min_length=1, max_length=1000)] = key(
        default_factory=lambda: [0], effect="trajectory", stage="sample"
    )
    """Positions of the control images, in their order."""

    no_post: bool = key(False, effect="trajectory", stage="sample")
    """Leaves out the empty frame after the section."""

    no_2x: bool = key(False, effect="trajectory", stage="sample")
    """Leaves out the two empty frames of half the resolution."""

    no_4x: bool = key(False, effect="trajectory", stage="sample")
    """Leaves out the sixteen empty frames of a quarter of the resolution."""


class PromptOptions(Section):
    """Keys of a prompt that [sampling] may set for all of them."""

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

    frames: int | None = key(None, effect="trajectory", stage="sample", ge=1, le=100_000)
    """Frames of a video, rounded down to 4n + 1; 1 is a still (hunyuan_video), and framepack makes whole sections. One of frames, seconds and sections; unset: 1."""

    seconds: Annotated[float, Field(gt=0, le=3600)] | None = key(None, effect="trajectory", stage="sample")
    """The same in seconds: of fps for hunyuan_video, of 30 frames for framepack."""

    sections: int | None = key(None, effect="trajectory", stage="sample", ge=1, le=1000)
    """The same in sections (framepack)."""

    fps: Annotated[float, Field(ge=1, le=240)] | None = key(None, effect="trajectory", stage="sample")
    """Frames a second that the video is shown at. Unset: by family (hunyuan_video: 24, framepack: 30)."""

    embedded_guidance: Annotated[float, Field(ge=0, le=100)] | None = key(None, effect="trajectory", stage="sample")
    """Guidance that a distilled denoiser is told. Unset: by family (flux1: 3.5, kontext 2.5; hunyuan_video: 6, framepack: 10)."""

    guidance_rescale: Annotated[float, Field(ge=0, le=1)] | None = key(None, effect="trajectory", stage="sample")
    """Share of the guided prediction that is scaled back to the unguided one's spread (arXiv 2305.08891), with cfg_scale above 1 (framepack). Unset: 0."""

    flow_shift: Annotated[float, Field(gt=0, le=100)] | None = key(None, effect="trajectory", stage="sample")
    """Moves the sampler's noise levels towards noise (sd3, flux1, hunyuan_video, framepack). Unset: by family (hunyuan_video: by the number of steps; flux1, framepack: by the size)."""

    image: Text | None = key(None, effect="trajectory", stage="sample", min_length=1)
    """The picture that a video starts from (framepack), or one for each section: "0:a.png;;;-1:b.png". Its content counts."""

    end_image: FilePath | None = key(None, effect="trajectory", stage="sample")
    """The picture that a video ends with (framepack, i2v)."""

    image_mask: FilePath | None = key(None, effect="trajectory", stage="sample")
    """What of the start image counts: a picture, white where it does (framepack, one frame)."""

    control_images: Annotated[list[FilePath], Field(min_length=1, max_length=100)] | None = key(
        None, effect="trajectory", stage="sample"
    )
    """Pictures that one-frame inference starts from (framepack; unset: the start image), or the reference that Kontext sees (flux1)."""

    control_masks: Annotated[list[FilePath], Field(min_length=1, max_length=100)] | None = key(
        None, effect="trajectory", stage="sample"
    )
    """What of the control images counts, in their order. Unset: their transparency."""

    one_frame: OneFrameInference | None = key(None, effect="trajectory", stage="sample")
    """Positions in one-frame inference; model.variant = "one_frame"."""

    latent_paddings: Annotated[list[Size], Field(min_length=1, max_length=1000)] | None = key(
        None, effect="trajectory", stage="sample"
    )
    """How many sections ahead the known future stands, for each section in the order of generation (framepack, i2v). Unset: FramePack's own."""

    custom_system_prompt: Text | None = key(None, effect="trajectory", stage="sample", min_length=1)
    """Replaces what LLaMA is told to do with the prompt (hunyuan_video, framepack)."""

    rope_scaling_factor: Annotated[float, Field(gt=0, le=4)] | None = key(None, effect="trajectory", stage="sample")
    """Factor on positions of rows and columns while the timestep is high (framepack): 0.5 for twice the training size. Unset: 0.5."""

    rope_scaling_timestep_threshold: Annotated[float, Field(ge=0, le=1000)] | None = key(
        None, effect="trajectory", stage="sample"
    )
    """From this timestep on positions are scaled; 800 is a start (framepack). Unset: never."""

    bulk_decode: bool | None = key(None, effect="trajectory", stage="sample")
    """Decodes all frames at once instead of section by section (framepack): more memory, no seams. Unset: false."""


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
