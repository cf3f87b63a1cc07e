"""Stable Diffusion 3 Medium with torch: loading, encoding, denoising, decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from runner.diffusion.process import FlowProcess, Process
from runner.families.contract import Conditioning
from runner.families.parts.bundle import bundle
from runner.families.parts.text import encode_clip, encode_t5, load_tokenizers
from runner.families.sd3.spec import FINDER
from runner.families.sd3.spec import SD3 as SPEC
from runner.families.sd3.tiny import write_tiny
from runner.model.numerics import Numerics

_PADS = {"text_encoder_2": "!"}
"""OpenCLIP's tokenizer pads with token 0."""


def encode_texts(
    encoders: Mapping[str, nn.Module],
    tokenizers: Mapping[str, Any],
    texts: Sequence[str],
    numerics: Numerics,
    weighting: bool,
) -> Conditioning:
    """{"hidden": [B, L1 + L2, D], "pooled": [B, P1 + P2]}.

    Both CLIPs' last but one layers side by side, filled up with zeros to T5's width, then T5's tokens; zeros in their
    place where the checkpoint has no T5, as in StableDiffusion3Pipeline.
    """
    first, second = (
        encode_clip(encoders[name], tokenizers[name], texts, 1, 2, False, weighting)
        for name in ("text_encoder_1", "text_encoder_2")
    )
    assert first.pooled is not None
    assert second.pooled is not None
    clip = torch.cat([first.hidden, second.hidden], dim=-1)
    length, width = numerics.max_token_length, numerics.text_width
    clip = torch.nn.functional.pad(clip, (0, width - clip.shape[-1]))
    if "text_encoder_3" in encoders:
        t5 = encode_t5(encoders["text_encoder_3"], tokenizers["text_encoder_3"], texts, length, weighting).to(
            clip.dtype
        )
    else:
        t5 = clip.new_zeros(len(texts), length, width)
    return {"hidden": torch.cat([clip, t5], dim=-2), "pooled": torch.cat([first.pooled, second.pooled], dim=-1)}


def process(numerics: Numerics) -> Process:
    return FlowProcess()


def denoise(denoiser: Any, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    dtype = denoiser.pos_embed.proj.weight.dtype
    answer: Tensor = denoiser(
        hidden_states=x_t.to(dtype),
        timestep=t.expand(x_t.shape[0]),
        encoder_hidden_states=conditioning["hidden"].to(dtype),
        pooled_projections=conditioning["pooled"].to(dtype),
        return_dict=False,
    )[0]
    return answer.float()


SD3 = bundle(SPEC, FINDER, partial(load_tokenizers, pads=_PADS), encode_texts, process, denoise, write_tiny)
