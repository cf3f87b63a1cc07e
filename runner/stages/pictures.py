"""One picture or video from one prompt. While training, for the strip and in `runner sample` it is made by these calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor, nn

from runner.core.precision import DTYPES, autocast
from runner.core.task import moved
from runner.data.images import to_picture
from runner.data.videos import mp4_bytes
from runner.diffusion.samplers import make_scheduler, sample
from runner.errors import RunFailed
from runner.families.contract import Conditioning, Shown
from runner.families.prompts import ReadyPrompt
from runner.stages.context import Context
from runner.stages.denoising import Denoisers
from runner.stages.encode import Encoding, TextEncoding
from runner.store.samples import poster_of


@dataclass
class Encoded:
    """What prompts say, encoded: (system prompt, text) → conditioning, and prompt's place → its pictures."""

    texts: dict[tuple[str | None, str], Encoding] = field(default_factory=dict)
    pictures: dict[int, Conditioning] = field(default_factory=dict)

    def of(self, prompt: ReadyPrompt, text: str) -> Encoding:
        return self.texts[prompt.system_prompt, text]


def encode_prompts(
    context: Context,
    prompts: Sequence[ReadyPrompt],
    weighting: bool,
    encoders: Mapping[str, nn.Module] | None = None,
    parts: Mapping[str, nn.Module] | None = None,
) -> Encoded:
    """Texts, each encoded alone; then the pictures that prompts name, with the encoders of texts let go. `parts` are what
    encodes pictures, where they are loaded already (`load_picture_parts`)."""
    encoding = TextEncoding(context, _compute_dtype(context), encoders, weighting)
    wanted = dict.fromkeys((prompt.system_prompt, text) for prompt in prompts for text in prompt.texts)
    found = Encoded({key: encoding.encode([key[1]], system=key[0])[0] for key in wanted})
    encode = context.family.encode_prompt
    wanting = [prompt for prompt in prompts if prompt.own is not None and prompt.own.pictures]
    if encode is None or not wanting:
        return found
    del encoding
    context.free()
    modules = parts or load_picture_parts(context)
    dtype = DTYPES[context.numerics.vae_dtype]
    for prompt in wanting:
        found.pictures[prompt.index] = encode(modules, prompt, context.device, dtype)
    return found


def load_picture_parts(context: Context) -> dict[str, nn.Module]:
    """What encodes the pictures that prompts name; nothing where prompts name none."""
    if context.family.encode_prompt is None:
        return {}
    modules = {name: context.load(name) for name in context.family.picture_parts}
    context.family.tile(modules["vae"], context.runtime.sample_tile, context.runtime.sample_chunk)
    return modules


def _compute_dtype(context: Context) -> str:
    return "fp32" if context.numerics.mixed_precision == "no" else context.numerics.mixed_precision


@torch.no_grad()
def make_latents(context: Context, modules: Mapping[str, nn.Module], prompt: ReadyPrompt, encoded: Encoded) -> Tensor:
    """Latents fp32 [1, C, h, w], of a video [1, C, T, h, w], of a prompt whose seed is known."""
    assert prompt.seed is not None
    model, numerics = context.runtime.model, context.numerics
    denoisers = Denoisers(context.family, model, modules)

    def call(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        with autocast(numerics.mixed_precision, context.device):
            return denoisers(x, t.to(context.device, non_blocking=True), t.reshape(-1), conditioning)

    made = context.family.made
    if made is not None:
        pictures = encoded.pictures[prompt.index]
        return made.generate(
            call, modules, prompt, lambda text: encoded.of(prompt, text), pictures, model, context.device
        )
    conditioning = _conditioning(context, prompt, encoded)
    shift = prompt.own.shift if prompt.own is not None else None
    config = model.scheduler if shift is None else {**model.scheduler, "shift": shift}
    scheduler = make_scheduler(prompt.sampler, config, numerics.prediction_type, numerics.zero_terminal_snr)
    frames = (prompt.frames - 1) // max(1, model.frame_factor) + 1
    shape = (1, *model.latent_shape((prompt.width, prompt.height), frames))
    return sample(
        scheduler,
        lambda x, t: call(x, t, conditioning),
        shape,
        prompt.num_inference_steps,
        prompt.cfg_scale,
        prompt.seed,
        context.device,
        context.family.levels(prompt.num_inference_steps) if context.family.levels is not None else None,
    )


def _conditioning(context: Context, prompt: ReadyPrompt, encoded: Encoded) -> Conditioning:
    """Of (negative, positive) at once, or of the positive alone where there is no guidance."""
    texts = [prompt.negative_prompt, prompt.prompt] if prompt.cfg_scale > 1 else [prompt.prompt]
    told = context.family.told(Shown.prompt(prompt), encoded.pictures.get(prompt.index, {}))
    rows = [{**encoded.of(prompt, text), **told} for text in texts]
    return moved({name: torch.stack([row[name] for row in rows]) for name in rows[0]}, context.device)


@torch.no_grad()
def decode(context: Context, vae: nn.Module, latents: Tensor, prompt: ReadyPrompt) -> Tensor:
    """Pixels [3, H, W] or [3, T, H, W] in -1..1. Raises `RunFailed` where the autoencoder gives no numbers."""
    made = context.family.made
    if made is not None:
        pixels = made.decode(vae, latents, prompt, context.runtime.model)
    else:
        pixels = context.family.decode_latents(vae, latents)[0]
    if not bool(torch.isfinite(pixels).all()):
        raise RunFailed(
            "decoding a sample gave values that are not finite",
            hint='the latents or the autoencoder overflow: try model.dtype = "bf16" or "fp32", or a lower learning rate',
        )
    return pixels


@dataclass(frozen=True)
class Media:
    """A sample's files: a PNG (of a video its middle frame), and of a video the mp4 and its settings as JSON."""

    png: bytes
    mp4: bytes | None = None
    settings: bytes | None = None


def media(pixels: Tensor, prompt: ReadyPrompt, label: str) -> Media:
    """The files of a sample."""
    if pixels.dim() == 3:
        return Media(png_bytes(to_picture(pixels), prompt, label))
    middle = to_picture(pixels[:, pixels.shape[1] // 2])
    if pixels.shape[1] == 1:
        return Media(png_bytes(middle, prompt, label))
    assert prompt.own is not None
    settings = json.dumps(_settings(prompt, label), sort_keys=True, ensure_ascii=False, indent=2) + "\n"
    mp4, settings_bytes = mp4_bytes(pixels, prompt.own.fps), settings.encode("utf-8")
    return Media(png_bytes(middle, prompt, label, poster_of(mp4, settings_bytes)), mp4, settings_bytes)


def _settings(prompt: ReadyPrompt, label: str) -> dict[str, Any]:
    return {**prompt.facts(), "checkpoint": label}


def png_bytes(picture: Image.Image, prompt: ReadyPrompt, label: str, more: Mapping[str, str] | None = None) -> bytes:
    """A PNG with its prompt and settings in text chunks: "parameters" as web UIs read it, "runner" as JSON."""
    lines = [prompt.prompt]
    if prompt.negative_prompt:
        lines.append(f"Negative prompt: {prompt.negative_prompt}")
    lines.append(
        f"Steps: {prompt.num_inference_steps}, Sampler: {prompt.sampler}, CFG scale: {prompt.cfg_scale:g}, "
        f"Seed: {prompt.seed}, Size: {prompt.width}x{prompt.height}, Checkpoint: {label}"
    )
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("parameters", "\n".join(lines))
    chunks.add_itxt("runner", json.dumps(_settings(prompt, label), sort_keys=True, ensure_ascii=False))
    for name, text in (more or {}).items():
        chunks.add_itxt(name, text)
    stream = BytesIO()
    picture.save(stream, "PNG", pnginfo=chunks)
    return stream.getvalue()
