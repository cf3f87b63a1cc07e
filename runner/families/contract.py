"""What a family is to the stages: a frozen bundle of functions, no inheritance. Needs torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runner.diffusion.process import Process
from runner.families.spec import FamilySpec, Model
from runner.inputs import Numerics

Conditioning = dict[str, Tensor]
"""What the denoiser is told besides the noisy latents; each tensor's first dimension is the batch."""


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Family:
    """A family's functions.

    load(model, component, options) → the module, in eval mode, without gradients.
    load_tokenizers(model) → text encoder → its tokenizer.
    encode_images(vae, pixels [B, 3, H, W] in -1..1, generators or None for the mode) → latents [B, C, h, w] in model space.
    encode_texts(encoders, tokenizers, texts, numerics, weighting) → conditioning of the texts; encoders by component.
    decode_latents(vae, latents) → pixels [B, 3, H, W] in -1..1.
    process(numerics) → the noise process.
    denoise(denoiser, x_t, t, conditioning) → the prediction, of x_t's shape; t holds timesteps [B].
    tiny(folder) → writes a checkpoint of the real classes with small random weights, which lets every path run on a CPU.
    save_pipeline(folder, model, state dicts by component, prediction type) → a whole directory in diffusers' layout.
    single_file(model, state dicts by component) → the state dict of one checkpoint in the original layout.
    denoiser_file(model, the denoiser's state dict) → the same for the denoiser alone, as ComfyUI loads it.
    size_conditioning(original size, corner of the crop, size) → conditioning of one picture's size, each (width, height);
        None where the denoiser is not told.
    """

    spec: FamilySpec
    load: Callable[[Model, str, LoadOptions], nn.Module]
    load_tokenizers: Callable[[Model], Mapping[str, Any]]
    encode_images: Callable[[nn.Module, Tensor, Sequence[torch.Generator] | None], Tensor]
    encode_texts: Callable[[Mapping[str, nn.Module], Mapping[str, Any], Sequence[str], Numerics, bool], Conditioning]
    decode_latents: Callable[[nn.Module, Tensor], Tensor]
    process: Callable[[Numerics], Process]
    denoise: Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]
    tiny: Callable[[Path], None]
    save_pipeline: Callable[[Path, Model, Mapping[str, Mapping[str, Tensor]], str], None]
    single_file: Callable[[Model, Mapping[str, Mapping[str, Tensor]]], dict[str, Tensor]]
    denoiser_file: Callable[[Model, Mapping[str, Tensor]], dict[str, Tensor]]
    size_conditioning: Callable[[tuple[int, int], tuple[int, int], tuple[int, int]], Conditioning] | None = None
