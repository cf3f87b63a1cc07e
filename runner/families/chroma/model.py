"""Chroma with torch: encoding texts, denoising, its bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from runner.diffusion.process import FlowProcess, Process
from runner.families.chroma.spec import CHROMA as SPEC
from runner.families.chroma.spec import FINDER
from runner.families.chroma.tiny import write_tiny
from runner.families.contract import Conditioning
from runner.families.flux1.model import levels, packed, positions, unpacked
from runner.families.parts.bundle import bundle
from runner.families.parts.text import load_tokenizers
from runner.model.numerics import Numerics


def encode_texts(
    encoders: Mapping[str, nn.Module],
    tokenizers: Mapping[str, Any],
    texts: Sequence[str],
    numerics: Numerics,
    weighting: bool,
) -> Conditioning:
    """{"hidden": [B, L, D] of T5, which sees no pads, "mask": [B, L]: the text and one pad behind it."""
    encoder: Any = encoders["text_encoder_1"]
    found = tokenizers["text_encoder_1"](
        list(texts), padding="max_length", max_length=numerics.max_token_length, truncation=True, return_tensors="pt"
    )
    device = next(encoder.parameters()).device
    hidden = encoder(found.input_ids.to(device), attention_mask=found.attention_mask.to(device))[0]
    counts = found.attention_mask.sum(1, keepdim=True)
    return {"hidden": hidden, "mask": (torch.arange(hidden.shape[1]) <= counts).to(hidden.dtype)}


def process(numerics: Numerics) -> Process:
    return FlowProcess()


def denoise(denoiser: Any, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    dtype = denoiser.x_embedder.weight.dtype
    answer: Tensor = denoiser(
        packed(x_t).to(dtype),
        positions(x_t, 0),
        conditioning["hidden"].to(dtype),
        conditioning["mask"] > 0.5,
        t.expand(x_t.shape[0]).float(),
    )
    return unpacked(answer, x_t)


CHROMA = bundle(
    SPEC, FINDER, partial(load_tokenizers, pads={}), encode_texts, process, denoise, write_tiny, levels=levels
)
