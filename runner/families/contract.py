"""What a family is to the stages: a frozen bundle of functions, no inheritance. Needs torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runner.data.images import PictureRequest
from runner.dataset.encodings import TrainItem
from runner.diffusion.process import Process
from runner.families.prompts import ReadyPrompt
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


Texts = Callable[[str], Conditioning]
"""A prompt's or a section's text → its conditioning, without the batch's dimension."""


@dataclass(frozen=True)
class Made:
    """How a family makes samples that does not go the common way of stages/pictures.py.

    encode_pictures(picture parts, prompt, device, dtype) → what is known of a prompt's pictures, on the CPU.
    generate(denoise(x, t, conditioning), modules, prompt, texts, pictures, model, device) → latents fp32 [1, C, T, h, w].
        Where the model has several denoisers, t is on the host: it chooses.
    decode(vae, latents, prompt, model) → pixels [3, T, H, W] in -1..1.
    """

    encode_pictures: Callable[[Mapping[str, nn.Module], ReadyPrompt, torch.device, torch.dtype], Conditioning]
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
    cut(item, its encoding) → what is trained of it: {"latents", "cond.<name>"}; None: all of it.
    made: how samples are made where it is not the common way.
    encode_references(picture parts, prompt, device, dtype) → conditioning of a prompt's reference pictures, on the CPU; of
        families whose denoiser sees them.
    levels(steps) → the sampler's noise levels before they are shifted; None: the scheduler's own.
    size_conditioning(original size, corner of the crop, size) → conditioning of one picture's size, each (width, height);
        None where the denoiser is not told.
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
    size_conditioning: Callable[[tuple[int, int], tuple[int, int], tuple[int, int]], Conditioning] | None = None
    picture_parts: tuple[str, ...] = ("vae",)
    encode_more: (
        Callable[[Mapping[str, nn.Module], PictureRequest, Tensor, torch.device, torch.dtype], dict[str, Tensor]] | None
    ) = None
    cut: Callable[[TrainItem, dict[str, Tensor]], dict[str, Tensor]] | None = None
    made: Made | None = None
    encode_references: (
        Callable[[Mapping[str, nn.Module], ReadyPrompt, torch.device, torch.dtype], Conditioning] | None
    ) = None
    levels: Callable[[int], Sequence[float]] | None = None
