"""FLUX.1 with torch: encoding texts and reference pictures, denoising, its bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from runner.data.images import PictureRequest, reference_pixels
from runner.diffusion.process import FlowProcess, Process
from runner.families.contract import Conditioning, Shown
from runner.families.flux1.spec import FINDER
from runner.families.flux1.spec import FLUX1 as SPEC
from runner.families.flux1.tiny import write_tiny
from runner.families.parts.autoencode import encode_images
from runner.families.parts.bundle import bundle
from runner.families.parts.text import encode_t5, load_tokenizers, pooled_clip
from runner.families.prompts import ReadyPrompt, StillPart
from runner.model.numerics import Numerics


def encode_texts(
    encoders: Mapping[str, nn.Module],
    tokenizers: Mapping[str, Any],
    texts: Sequence[str],
    numerics: Numerics,
    weighting: bool,
) -> Conditioning:
    """{"hidden": [B, L, D] of T5, pads seen, "pooled": [B, P] of CLIP}."""
    pooled = pooled_clip(encoders["text_encoder_1"], tokenizers["text_encoder_1"], texts)
    encoder, tokenizer = encoders["text_encoder_2"], tokenizers["text_encoder_2"]
    return {"hidden": encode_t5(encoder, tokenizer, texts, numerics.max_token_length, False), "pooled": pooled}


_REFERENCE = "cond.reference"
"""A reference's latents in the store."""


def encode_more(
    modules: Mapping[str, nn.Module], request: PictureRequest, pixels: Tensor, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The latents of a picture's reference, where it has one."""
    return _reference(modules["vae"], request.sized_pictures(), device, dtype)


@torch.no_grad()
def encode_prompt(
    modules: Mapping[str, nn.Module], prompt: ReadyPrompt, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The same of a prompt."""
    assert isinstance(prompt.own, StillPart)
    pictures = [reference_pixels(file.path, file.digest, size) for file, size in prompt.own.references]
    return {name: x.cpu() for name, x in _reference(modules["vae"], pictures, device, dtype).items()}


def _reference(
    vae: nn.Module, pictures: Sequence[Tensor], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    found = [encode_images(vae, picture[None].to(device, dtype), None)[0] for picture in pictures]
    return {_REFERENCE: found[0]} if found else {}


def conditioning(shown: Shown, encoding: Mapping[str, Tensor]) -> Conditioning:
    """The reference, where there is one."""
    return {"reference": encoding[_REFERENCE]} if _REFERENCE in encoding else {}


def process(numerics: Numerics) -> Process:
    return FlowProcess()


def levels(steps: int) -> list[float]:
    """The sampler's noise levels before they are shifted."""
    return [1 - index / steps for index in range(steps)]


def packed(latents: Tensor) -> Tensor:
    """[B, C, h, w] → tokens [B, h / 2 * w / 2, 4 C], of each patch the channel first."""
    return nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, like: Tensor) -> Tensor:
    """The reverse in fp32, of the shape of `like`."""
    grid = tokens.transpose(1, 2).unflatten(2, (like.shape[2] // 2, like.shape[3] // 2))
    return nn.functional.pixel_shuffle(grid, 2).float()


def positions(latents: Tensor, kind: int) -> Tensor:
    """[N, 3]: 0 for what is made, 1 for a reference; row; column."""
    height, width = latents.shape[-2] // 2, latents.shape[-1] // 2
    where = torch.empty(height, width, 3, device=latents.device)
    where[..., 0] = kind
    where[..., 1] = torch.arange(height, device=latents.device)[:, None]
    where[..., 2] = torch.arange(width, device=latents.device)
    return where.flatten(0, 1)


def denoise(denoiser: Any, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """The reference stands behind what is made; its answer is left out."""
    dtype, batch = denoiser.x_embedder.weight.dtype, x_t.shape[0]
    tokens, where = packed(x_t), positions(x_t, 0)
    count = tokens.shape[1]
    if "reference" in conditioning:
        reference = conditioning["reference"]
        tokens = torch.cat([tokens, packed(reference).to(tokens)], dim=1)
        where = torch.cat([where, positions(reference, 1)])
    hidden = conditioning["hidden"].to(dtype)
    guidance = conditioning.get("guidance")
    answer: Tensor = denoiser(
        hidden_states=tokens.to(dtype),
        encoder_hidden_states=hidden,
        pooled_projections=conditioning["pooled"].to(dtype),
        timestep=t.expand(batch).float() / 1000,
        img_ids=where,
        txt_ids=where.new_zeros(hidden.shape[1], 3),
        guidance=None if guidance is None else guidance.expand(batch).float() / 1000,
        return_dict=False,
    )[0]
    return unpacked(answer[:, :count], x_t)


FLUX1 = bundle(
    SPEC,
    FINDER,
    partial(load_tokenizers, pads={}),
    encode_texts,
    process,
    denoise,
    write_tiny,
    encode_more=encode_more,
    encode_prompt=encode_prompt,
    conditioning=conditioning,
    levels=levels,
)
