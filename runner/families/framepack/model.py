"""FramePack with torch: denoising, and its bundle."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from runner.families.contract import Conditioning
from runner.families.framepack.encoding import KNOWN, conditioning, encode_more, target
from runner.families.framepack.sampling import MADE, encode_prompt
from runner.families.framepack.spec import FINDER
from runner.families.framepack.spec import FRAMEPACK as SPEC
from runner.families.framepack.tiny import write_tiny
from runner.families.framepack.transformer import Clean
from runner.families.hunyuan_video.model import encode_texts, load_llama_tokenizers, process, text_arguments
from runner.families.parts.bundle import bundle
from runner.families.parts.video_vae import encode_images


def denoise(denoiser: Any, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    dtype = denoiser.x_embedder.proj.weight.dtype
    known = {
        name: Clean(conditioning[name].to(dtype), conditioning[f"{name}_positions"])
        for name in KNOWN
        if name in conditioning
    }
    answer: Tensor = denoiser(
        x_t.to(dtype),
        **text_arguments(conditioning, t, x_t.shape[0], dtype),
        image=conditioning["image"].to(dtype),
        positions=conditioning["positions"],
        **known,
    )
    return answer.float()


FRAMEPACK = bundle(
    SPEC,
    FINDER,
    load_llama_tokenizers,
    encode_texts,
    process,
    denoise,
    write_tiny,
    encode_images=encode_images,
    picture_parts=("vae", "image_encoder"),
    encode_more=encode_more,
    encode_prompt=encode_prompt,
    conditioning=conditioning,
    target=target,
    made=MADE,
)
