"""Keys of FramePack alone: what its sections and its single frames are made from."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from schemas.base import FilePath, Section, Text, key

Position = Annotated[int, Field(ge=0, le=1000)]


class OneFrameInference(Section):
    """One-frame inference of FramePack: where the made frame and the control images stand in time."""

    target_index: Position | None = key(None, effect="trajectory", stage="sample")
    """Position of the made picture. Unset: model.latent_window_size."""

    control_index: Annotated[list[Position], Field(min_length=1, max_length=1000)] = key(
        default_factory=lambda: [0], effect="trajectory", stage="sample"
    )
    """Positions of the control images, in their order."""

    no_post: bool = key(False, effect="trajectory", stage="sample")
    """Leaves out the empty frame after the section."""

    no_2x: bool = key(False, effect="trajectory", stage="sample")
    """Leaves out the two empty frames of half the resolution."""

    no_4x: bool = key(False, effect="trajectory", stage="sample")
    """Leaves out the sixteen empty frames of a quarter of the resolution."""


class OneFrame(Section):
    """One-frame training of FramePack: where the made frame and the control images stand in time."""

    target_index: Position | None = key(None, effect="trajectory", stage="train")
    """Position of the picture that is learned. Unset: model.latent_window_size."""

    clean_indices: Annotated[list[Position], Field(min_length=1, max_length=100)] = key(
        default_factory=lambda: [0], effect="trajectory", stage="train"
    )
    """Positions of the control images, in their order."""

    no_post: bool = key(False, effect="trajectory", stage="train")
    """Leaves out the empty frame after the section."""

    no_2x: bool = key(False, effect="trajectory", stage="train")
    """Leaves out the two empty frames of half the resolution."""

    no_4x: bool = key(False, effect="trajectory", stage="train")
    """Leaves out the sixteen empty frames of a quarter of the resolution."""


class SectionsModel(Section):
    """FramePack's sections, and its image encoder."""

    latent_window_size: int | None = key(None, effect="trajectory", stage=("train", "sample"), ge=1, le=64)
    """Latent frames of one section (framepack). Unset: 9."""

    image_encoder: FilePath | None = key(None, effect="none")
    """SigLIP's vision tower (framepack): a file or a directory."""


class OneFrameSource(Section):
    """How a source trains single frames."""

    one_frame: OneFrame | None = key(None, effect="none")
    """Positions in one-frame training; model.variant = "one_frame"."""


class SectionsPrompt(Section):
    """What FramePack's sections are made from."""

    sections: int | None = key(None, effect="trajectory", stage="sample", ge=1, le=1000)
    """The same in sections (framepack)."""

    guidance_rescale: Annotated[float, Field(ge=0, le=1)] | None = key(None, effect="trajectory", stage="sample")
    """Share of the guided prediction that is scaled back to the unguided one's spread (arXiv 2305.08891), with cfg_scale above 1 (framepack). Unset: 0."""

    image: Text | None = key(None, effect="trajectory", stage="sample", min_length=1)
    """The picture that a video starts from (framepack), or one for each section: "0:a.png;;;-1:b.png". Its content counts."""

    end_image: FilePath | None = key(None, effect="trajectory", stage="sample")
    """The picture that a video ends with (framepack, i2v)."""

    image_mask: FilePath | None = key(None, effect="trajectory", stage="sample")
    """What of the start image counts: a picture, white where it does (framepack, one frame)."""

    one_frame: OneFrameInference | None = key(None, effect="trajectory", stage="sample")
    """Positions in one-frame inference; model.variant = "one_frame"."""

    latent_paddings: Annotated[list[Position], Field(min_length=1, max_length=1000)] | None = key(
        None, effect="trajectory", stage="sample"
    )
    """How many sections ahead the known future stands, for each section in the order of generation (framepack, i2v). Unset: FramePack's own."""

    rope_scaling_factor: Annotated[float, Field(gt=0, le=4)] | None = key(None, effect="trajectory", stage="sample")
    """Factor on positions of rows and columns while the timestep is high (framepack): 0.5 for twice the training size. Unset: 0.5."""

    rope_scaling_timestep_threshold: Annotated[float, Field(ge=0, le=1000)] | None = key(
        None, effect="trajectory", stage="sample"
    )
    """From this timestep on positions are scaled; 800 is a start (framepack). Unset: never."""

    bulk_decode: bool | None = key(None, effect="trajectory", stage="sample")
    """Decodes all frames at once instead of section by section (framepack): more memory, no seams. Unset: false."""
