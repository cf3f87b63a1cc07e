"""[selection]: which checkpoint is the best, and where it is published."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from schemas.base import FilePath, Section, Steps, key


class Veto(Section):
    """What rules a checkpoint out. A loss that is not a number always does."""

    max_loss_above_base: Annotated[float, Field(ge=0, le=1_000_000)] | None = key(
        None, effect="trajectory", stage="select"
    )
    """Its stable loss is above the base model's by more than this. Unset: off."""

    max_similarity: Annotated[float, Field(gt=0, le=1)] | None = key(None, effect="trajectory", stage="select")
    """One of its samples is this similar to a training picture (cosine of centred 32 x 32 thumbnails), a sign of memorisation. Unset: off."""


class Publish(Section):
    """One place that gets the chosen weights: [[selection.publish]]."""

    format: Literal["kohya", "diffusers", "comfyui", "single_file"] = key("kohya", effect="none", stage="publish")
    """kohya: one LoRA file in Kohya's names. diffusers: a PEFT LoRA file, or a whole diffusers directory for a full fine-tune. The scale alpha / rank is in its tensors. comfyui: what ComfyUI loads (a LoRA file under names that it knows, or the denoiser alone: a folder with a file for each where the model has several). What Kohya's and ComfyUI's files have no form for (oft; lokr of a fused q, k, v) is written as differences of the weights; the plan says so. single_file: one checkpoint in the original layout, the adapter merged."""

    directory: FilePath = key(effect="none", stage="publish")
    """The folder; made where it is missing."""

    mode: Literal["symlink", "copy"] = key("symlink", effect="none", stage="publish")
    """A link into the store, or a copy. Where links are not allowed a copy is made, and said so."""

    which: Literal["best", "all"] = key("best", effect="none", stage="publish")
    """The chosen checkpoint, or every one."""

    name: str | None = key(None, effect="none", stage="publish", pattern=r"^[^/\\]+$", max_length=200)
    """File name without its extension; {name}, {step} and {weights} are filled in. Unset: "{name}", and "{name}-{step}" for all."""


class Selection(Section):
    """How the best checkpoint is chosen and where it goes."""

    strategy: Literal["best", "last", "manual"] = key("best", effect="trajectory", stage="select")
    """best: by the metric, and where 12 items or more are measured the earliest of those within its error. last: the last. manual: the one named by step."""

    metrics: list[Literal["stable_loss"]] = key(
        default_factory=lambda: ["stable_loss"], effect="trajectory", stage="select", max_length=1
    )
    """What is measured. stable_loss: the loss of the held-out items at fixed noise and noise levels. Empty with "last" or "manual": nothing is measured."""

    step: Steps | None = key(None, effect="trajectory", stage="select")
    """The checkpoint that strategy = "manual" takes."""

    veto: Veto = key(default_factory=Veto, effect="none")
    """What rules a checkpoint out."""

    publish: list[Publish] = key(default_factory=list, effect="none", max_length=100)
    """Where the chosen weights go."""
