"""One picture from one prompt. While training, for the strip and in `runner sample` it is made by these same calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor, nn

from runner.config.prompts import ReadyPrompt
from runner.core.precision import autocast
from runner.data.images import to_picture
from runner.diffusion.samplers import make_scheduler, sample
from runner.errors import RunFailed
from runner.stages.context import Context
from runner.stages.encode import Encoding, TextEncoding


def encode_prompts(
    context: Context, prompts: Sequence[ReadyPrompt], weighting: bool, encoders: Mapping[str, nn.Module] | None = None
) -> dict[str, Encoding]:
    """Text → conditioning, for prompts and negative prompts, each encoded alone."""
    encoding = TextEncoding(context, _compute_dtype(context), encoders, weighting)
    texts = dict.fromkeys(text for prompt in prompts for text in (prompt.prompt, prompt.negative_prompt))
    return {text: encoding.encode([text])[0] for text in texts}


def _compute_dtype(context: Context) -> str:
    return "fp32" if context.numerics.mixed_precision == "no" else context.numerics.mixed_precision


@torch.no_grad()
def make_latents(context: Context, denoiser: nn.Module, prompt: ReadyPrompt, encoded: dict[str, Encoding]) -> Tensor:
    """Latents fp32 [1, C, h, w] of a prompt whose seed is known."""
    assert prompt.seed is not None
    model, numerics = context.runtime.model, context.numerics
    scheduler = make_scheduler(prompt.sampler, model.scheduler, numerics.prediction_type, numerics.zero_terminal_snr)
    texts = [prompt.negative_prompt, prompt.prompt] if prompt.cfg_scale > 1 else [prompt.prompt]
    sizes: Encoding = {}
    if context.family.size_conditioning is not None:
        size = (prompt.width, prompt.height)
        sizes = context.family.size_conditioning(size, (0, 0), size)
    rows = [{**encoded[text], **sizes} for text in texts]
    conditioning = {name: torch.stack([row[name] for row in rows]).to(context.device) for name in rows[0]}

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        with autocast(numerics.mixed_precision, context.device):
            return context.family.denoise(denoiser, x, t.to(context.device), conditioning)

    shape = (1, model.latent_channels, prompt.height // model.latent_factor, prompt.width // model.latent_factor)
    return sample(scheduler, denoise, shape, prompt.num_inference_steps, prompt.cfg_scale, prompt.seed, context.device)


@torch.no_grad()
def decode(context: Context, vae: nn.Module, latents: Tensor) -> Image.Image:
    """The picture of [1, C, h, w] latents. Raises `RunFailed` where the autoencoder gives no numbers."""
    pixels = context.family.decode_latents(vae, latents)[0]
    if not bool(torch.isfinite(pixels).all()):
        raise RunFailed(
            "decoding a sample gave values that are not finite",
            hint='the latents or the autoencoder overflow: try model.dtype = "bf16" or "fp32", or a lower learning rate',
        )
    return to_picture(pixels)


def png_bytes(picture: Image.Image, prompt: ReadyPrompt, label: str) -> bytes:
    """A PNG with its prompt and settings in text chunks: "parameters" as web UIs read it, "runner" as JSON."""
    settings: dict[str, Any] = {**prompt.facts(), "checkpoint": label}
    lines = [prompt.prompt]
    if prompt.negative_prompt:
        lines.append(f"Negative prompt: {prompt.negative_prompt}")
    lines.append(
        f"Steps: {prompt.num_inference_steps}, Sampler: {prompt.sampler}, CFG scale: {prompt.cfg_scale:g}, "
        f"Seed: {prompt.seed}, Size: {prompt.width}x{prompt.height}, Checkpoint: {label}"
    )
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("parameters", "\n".join(lines))
    chunks.add_itxt("runner", json.dumps(settings, sort_keys=True, ensure_ascii=False))
    stream = BytesIO()
    picture.save(stream, "PNG", pnginfo=chunks)
    return stream.getvalue()
