"""What a family is to the stages: a frozen bundle of functions, no inheritance. Needs torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runner.data.images import PictureRequest
from runner.dataset.buckets import Size, View
from runner.dataset.encodings import TrainItem
from runner.dataset.parts import ItemPart
from runner.diffusion.process import Process
from runner.families.prompts import PromptPart, ReadyPrompt
from runner.families.spec import FamilySpec
from runner.model.model import Model
from runner.model.numerics import Numerics

Conditioning = dict[str, Tensor]
"""What the denoiser is told besides the noisy latents; each tensor's first dimension is the batch."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a component is loaded."""

    dtype: torch.dtype
    device: torch.device
    attention: str = "sdpa"
    scratch_seed: int | None = None
    """Draw new weights from this seed instead of loading any."""
    trains: bool = False
    """The weights will be written to."""
    quantization: str = "none"
    """How the linear layers of its blocks are held (networks/quantize.py)."""
    split_attention: bool = False
    """One sample after the other, where they have text of different lengths."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What the denoiser learns from, is measured on or makes: an item in one of its views, or a prompt."""

    original: Size
    """Of the picture before it was resized; of a prompt the size that is made."""
    corner: tuple[int, int]
    """Of the crop."""
    size: Size
    guidance: float | None
    """What a distilled denoiser is told, in thousandths of a scale of 1."""
    own: ItemPart | PromptPart | None
    """What it says to its family alone."""

    @classmethod
    def item(cls, item: TrainItem, view: View, guidance: float | None) -> Shown:
        return cls(original=item.fit.original, corner=view.corner, size=view.bucket, guidance=guidance, own=item.own)

    @classmethod
    def prompt(cls, prompt: ReadyPrompt) -> Shown:
        size, own = (prompt.width, prompt.height), prompt.own
        guidance = None if own is None or own.guidance is None else 1000.0 * own.guidance
        return cls(original=size, corner=(0, 0), size=size, guidance=guidance, own=own)


Texts = Callable[[str], Conditioning]
"""A prompt's or a section's text → its conditioning, without the batch's dimension."""


@dataclass(frozen=True)
class Made:
    """How a family makes samples that does not go the common way of stages/pictures.py.

    generate(denoise(x, t, conditioning), modules, prompt, texts, pictures, model, device) → latents fp32 [1, C, T, h, w].
        Where the model has several denoisers, t is on the host: it chooses.
    decode(vae, latents, prompt, model) → pixels [3, T, H, W] in -1..1.
    """

    generate: Callable[
        [
            Callable[[Tensor, Tensor, Conditioning], Tensor],
            Mapping[str, Any],
            ReadyPrompt,
            Texts,
            Conditioning,
            Model,
            torch.device,
        ],
        Tensor,
    ]
    decode: Callable[[nn.Module, Tensor, ReadyPrompt, Model], Tensor]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family's functions.

    load(model, component, options) → the module, in eval mode, without gradients.
    recompute(component, module) has its repeated blocks computed anew in the backward pass (gradient checkpointing).
    tile(vae, side, strip) has it work in overlapping tiles of `side` pixels, and compute convolutions over time in strips of
        that width; None: in whole.
    load_tokenizers(model) → text encoder → its tokenizer.
    encode_images(vae, pixels [B, 3, H, W] in -1..1, generators or None for the mode) → latents [B, C, h, w] in model space.
    encode_texts(encoders, tokenizers, texts, numerics, weighting) → conditioning of the texts; encoders by component.
        Those with a system prompt take another one as `system`.
    decode_latents(vae, latents) → pixels [B, 3, H, W] in -1..1.
    process(numerics) → the noise process.
    denoise(denoiser, x_t, t, conditioning) → the prediction, of x_t's shape; t holds timesteps [B]. Which of several
        denoisers it is given, `Model.denoisers` says.
    tiny(folder) → writes a checkpoint of the real classes with small random weights, which lets every path run on a CPU.
    save_pipeline(folder, model, state dicts by component, prediction type, whether the last step is pure noise) → a whole
        directory in diffusers' layout.
    single_file(model, state dicts by component) → the state dict of one checkpoint in the original layout.
    denoiser_file(model, one of its denoisers, its state dict) → the same for that alone, as ComfyUI loads it.
    picture_parts: the components that encode pictures.
    encode_more(picture parts, request, its pixels, device, dtype) → what is kept of a picture beside its latents.
    encode_prompt(picture parts, prompt, device, dtype) → the same of the pictures that a prompt names, on the CPU.
    conditioning(an item or a prompt, its encoding as these two make it) → what its denoiser is told beside texts and
        guidance, without the batch's dimension. Training, scoring and sampling ask through `told`.
    target(what an item says to the family alone, its latents) → those that are trained; None: all of them.
    made: how samples are made where it is not the common way.
    levels(steps) → the sampler's noise levels before they are shifted; None: the scheduler's own.
    """

    spec: FamilySpec
    load: Callable[[Model, str, LoadOptions], nn.Module]
    recompute: Callable[[str, nn.Module], None]
    tile: Callable[[nn.Module, int | None, int | None], None]
    load_tokenizers: Callable[[Model], Mapping[str, Any]]
    encode_images: Callable[[nn.Module, Tensor, Sequence[torch.Generator] | None], Tensor]
    encode_texts: Callable[..., Conditioning]
    decode_latents: Callable[[nn.Module, Tensor], Tensor]
    process: Callable[[Numerics], Process]
    denoise: Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]
    tiny: Callable[[Path], None]
    save_pipeline: Callable[[Path, Model, Mapping[str, Mapping[str, Tensor]], str, bool], None]
    single_file: Callable[[Model, Mapping[str, Mapping[str, Tensor]]], dict[str, Tensor]]
    denoiser_file: Callable[[Model, str, Mapping[str, Tensor]], dict[str, Tensor]]
    picture_parts: tuple[str, ...] = ("vae",)
    encode_more: (
        Callable[[Mapping[str, nn.Module], PictureRequest, Tensor, torch.device, torch.dtype], dict[str, Tensor]] | None
    ) = None
    encode_prompt: (
        Callable[[Mapping[str, nn.Module], ReadyPrompt, torch.device, torch.dtype], dict[str, Tensor]] | None
    ) = None
    conditioning: Callable[[Shown, Mapping[str, Tensor]], Conditioning] | None = None
    target: Callable[[ItemPart | None, Tensor], Tensor] | None = None
    made: Made | None = None
    levels: Callable[[int], Sequence[float]] | None = None

    def told(self, shown: Shown, encoding: Mapping[str, Tensor]) -> Conditioning:
        """What the denoiser is told of an item or a prompt beside its texts."""
        found = {} if self.conditioning is None else self.conditioning(shown, encoding)
        return found if shown.guidance is None else {**found, "guidance": torch.tensor(shown.guidance)}

    def learned(
        self, item: TrainItem, view: View, guidance: float | None, encoding: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What is trained and measured of an item: {"latents", "mask", "cond.<name>"}."""
        latents = encoding["latents"]
        found = {"latents": latents if self.target is None else self.target(item.own, latents)}
        if "mask" in encoding:
            found["mask"] = encoding["mask"]
        told = self.told(Shown.item(item, view, guidance), encoding)
        return found | {f"cond.{name}": tensor for name, tensor in told.items()}
