"""Stable Diffusion 1.5 and XL with torch: loading, encoding, denoising, decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from runner.diffusion.process import Process, make_process
from runner.families.contract import Conditioning, Shown
from runner.families.parts.bundle import bundle
from runner.families.parts.text import PIECE, encode_clip, load_tokenizers
from runner.families.sd.spec import SD15 as SD15_SPEC
from runner.families.sd.spec import SD15_FINDER, SDXL_FINDER
from runner.families.sd.spec import SDXL as SDXL_SPEC
from runner.families.sd.tiny import write_tiny, write_tiny_sdxl
from runner.model.numerics import Numerics

_SDXL_PADS = {"text_encoder_2": "!"}
"""OpenCLIP's tokenizer pads with token 0."""


def process(numerics: Numerics) -> Process:
    return make_process(numerics.noise_schedule, numerics.prediction_type, numerics.zero_terminal_snr)


def encode_texts_sd15(
    encoders: Mapping[str, nn.Module],
    tokenizers: Mapping[str, Any],
    texts: Sequence[str],
    numerics: Numerics,
    weighting: bool,
) -> Conditioning:
    """{"hidden": [B, L, D]}; clip_skip takes hidden states from before the last layers and applies the final norm."""
    found = encode_clip(
        encoders["text_encoder_1"],
        tokenizers["text_encoder_1"],
        texts,
        numerics.max_token_length // PIECE,
        numerics.clip_skip,
        True,
        weighting,
    )
    return {"hidden": found.hidden}


def encode_texts_sdxl(
    encoders: Mapping[str, nn.Module],
    tokenizers: Mapping[str, Any],
    texts: Sequence[str],
    numerics: Numerics,
    weighting: bool,
) -> Conditioning:
    """{"hidden": [B, L, D1 + D2], "pooled": [B, P]}: the last but one layer of both encoders, without the final norm."""
    first, second = (
        encode_clip(
            encoders[name],
            tokenizers[name],
            texts,
            numerics.max_token_length // PIECE,
            numerics.clip_skip,
            False,
            weighting,
        )
        for name in ("text_encoder_1", "text_encoder_2")
    )
    assert second.pooled is not None
    return {"hidden": torch.cat([first.hidden, second.hidden], dim=-1), "pooled": second.pooled}


def sizes(shown: Shown, encoding: Mapping[str, Tensor]) -> Conditioning:
    """{"time_ids": [6]}: original height and width, top and left of the crop, height and width (arXiv 2307.01952, 2.2)."""
    ids = [number for width, height in (shown.original, shown.corner, shown.size) for number in (height, width)]
    return {"time_ids": torch.tensor(ids, dtype=torch.float32)}


def denoise(denoiser: Any, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    dtype = denoiser.conv_in.weight.dtype
    added = None
    if "pooled" in conditioning:  # sizes stay whole numbers until their sinusoids are taken: bf16 makes 1365 1368
        added = {"text_embeds": conditioning["pooled"].to(dtype), "time_ids": conditioning["time_ids"].float()}
    hidden = conditioning["hidden"].to(dtype)
    return denoiser(x_t.to(dtype), t, encoder_hidden_states=hidden, added_cond_kwargs=added, return_dict=False)[
        0
    ].float()


SD15 = bundle(
    SD15_SPEC, SD15_FINDER, partial(load_tokenizers, pads={}), encode_texts_sd15, process, denoise, write_tiny
)
SDXL = bundle(
    SDXL_SPEC,
    SDXL_FINDER,
    partial(load_tokenizers, pads=_SDXL_PADS),
    encode_texts_sdxl,
    process,
    denoise,
    write_tiny_sdxl,
    conditioning=sizes,
)
