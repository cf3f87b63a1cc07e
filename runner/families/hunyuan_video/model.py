"""HunyuanVideo with torch: encoding, denoising, the noise process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from runner.diffusion.process import FlowProcess, Process
from runner.families.contract import Conditioning
from runner.families.hunyuan_video.spec import FINDER
from runner.families.hunyuan_video.spec import HUNYUAN_VIDEO as SPEC
from runner.families.hunyuan_video.tiny import write_tiny
from runner.families.parts.bundle import bundle
from runner.families.parts.text import load_tokenizers
from runner.families.parts.texts_llama import encode_llama_clip
from runner.families.parts.video_vae import encode_images
from runner.model.numerics import Numerics

load_llama_tokenizers = partial(load_tokenizers, pads={})


def encode_texts(
    encoders: Mapping[str, nn.Module],
    tokenizers: Mapping[str, Any],
    texts: Sequence[str],
    numerics: Numerics,
    weighting: bool,
    system: str | None = None,
) -> Conditioning:
    """{"text": [B, 256, D], "mask": [B, 256], "pooled": [B, P]}."""
    return encode_llama_clip(encoders, tokenizers, texts, system)


def process(numerics: Numerics) -> Process:
    """Rectified flow; musubi-tuner tells the denoiser 1000 sigma + 1 in training."""
    return FlowProcess(offset=1.0)


def text_arguments(conditioning: Conditioning, t: Tensor, batch: int, dtype: Any) -> dict[str, Tensor]:
    """What the transformer is told of the text, the timestep and the guidance."""
    return {
        "timestep": t.expand(batch).float(),
        "text": conditioning["text"].to(dtype),
        "mask": conditioning["mask"] > 0.5,
        "pooled": conditioning["pooled"].to(dtype),
        "guidance": conditioning["guidance"].expand(batch).float(),
    }


def denoise(denoiser: Any, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    dtype = denoiser.x_embedder.proj.weight.dtype
    answer: Tensor = denoiser(x_t.to(dtype), **text_arguments(conditioning, t, x_t.shape[0], dtype))
    return answer.float()


HUNYUAN_VIDEO = bundle(
    SPEC, FINDER, load_llama_tokenizers, encode_texts, process, denoise, write_tiny, encode_images=encode_images
)
