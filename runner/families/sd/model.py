"""Stable Diffusion 1.5 with torch: loading, encoding, denoising, decoding, and the tiny model for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from runner.core.rng import forked
from runner.diffusion.process import Process, make_process
from runner.errors import RunFailed
from runner.families.contract import Conditioning, Family, LoadOptions
from runner.families.sd.save import denoiser_file, original_state, save_pipeline
from runner.families.sd.spec import SD15 as SPEC
from runner.families.sd.text import encode_texts, load_tokenizer
from runner.families.sd.tiny import write_tiny
from runner.families.spec import Component, Model
from runner.formats.tensors import read_tensors
from runner.inputs import Numerics


def _empty(component: Component) -> nn.Module:
    """The module on the meta device: its layers without any numbers."""
    config: dict[str, Any] = json.loads(json.dumps(component.config))
    with torch.device("meta"):
        if component.name == "text_encoder_1":
            return CLIPTextModel(CLIPTextConfig(**config))
        cls = UNet2DConditionModel if component.name == "denoiser" else AutoencoderKL
        return cls.from_config(config)


def load(model: Model, name: str, options: LoadOptions) -> nn.Module:
    """One component, its weights read straight into place: host memory never holds two copies.

    Raises `RunFailed` where the file no longer holds what its header said.
    """
    component = model.components[name]
    if options.scratch_seed is not None:
        return _finished(_drawn(component, options), name, options)
    module = _empty(component)
    tensors = read_tensors(
        component.weights[0], component.keys, options.dtype, options.device, mapped=not options.trains
    )
    shapes = {key: value.shape for key, value in module.state_dict().items()}
    for key, tensor in tensors.items():
        if key in shapes and tensor.shape != shapes[key]:
            tensors[key] = tensor.reshape(shapes[key])  # a 1x1 convolution that is a linear layer here
    try:
        module.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise RunFailed(f"{component.weights[0]} does not fit the {name}: {error}") from None
    tensors.clear()  # else each stays alive beside its copy in channels_last
    return _finished(module, name, options)


def _drawn(component: Component, options: LoadOptions) -> nn.Module:
    assert options.scratch_seed is not None
    config: dict[str, Any] = json.loads(json.dumps(component.config))
    with forked(options.scratch_seed, "scratch", component.name):
        if component.name == "text_encoder_1":
            module: nn.Module = CLIPTextModel(CLIPTextConfig(**config))
        else:
            module = UNet2DConditionModel.from_config(config)
    return module.to(options.device, options.dtype)


def _finished(module: Any, name: str, options: LoadOptions) -> nn.Module:
    for buffer_name, buffer in list(module.named_buffers()):
        if buffer.is_meta:  # position_ids: not part of any file
            owner, _, last = buffer_name.rpartition(".")
            positions = torch.arange(buffer.shape[-1], device=options.device).expand(buffer.shape)
            module.get_submodule(owner).register_buffer(last, positions, persistent=False)
    if name == "denoiser" and options.device.type == "cuda":  # on a CPU it is not faster, and takes a copy
        module.to(memory_format=torch.channels_last)
    if name in ("denoiser", "vae") and options.attention == "eager":
        module.set_default_attn_processor() if name == "vae" else _plain_attention(module)
    finished: nn.Module = module.requires_grad_(False).eval()
    return finished


def _plain_attention(module: Any) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    module.set_attn_processor(AttnProcessor())


def encode_images(vae: Any, pixels: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
    """Latents in the denoiser's scale; the distribution's mode, or one sample per picture from its own generator."""
    distribution = vae.encode(pixels).latent_dist
    latents = distribution.mode()
    if generators is not None:
        noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
        latents = distribution.mean + distribution.std * noise.to(latents.device, latents.dtype)
    return latents * vae.config.scaling_factor


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Pixels in -1..1 (not clipped)."""
    dtype = next(vae.parameters()).dtype
    return vae.decode((latents / vae.config.scaling_factor).to(dtype)).sample


def process(numerics: Numerics) -> Process:
    return make_process(numerics.noise_schedule, numerics.prediction_type, numerics.zero_terminal_snr)


def denoise(denoiser: Any, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    dtype = denoiser.conv_in.weight.dtype
    hidden = conditioning["hidden"].to(dtype)
    return denoiser(x_t.to(dtype), t, encoder_hidden_states=hidden, return_dict=False)[0].float()


def tiny(folder: Path) -> None:
    write_tiny(folder)


SD15 = Family(
    spec=SPEC,
    load=load,
    load_tokenizer=load_tokenizer,
    encode_images=encode_images,
    encode_texts=encode_texts,
    decode_latents=decode_latents,
    process=process,
    denoise=denoise,
    tiny=tiny,
    save_pipeline=save_pipeline,
    single_file=original_state,
    denoiser_file=denoiser_file,
)
