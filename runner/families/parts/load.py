"""Loads a component with torch: its class by name, its weights read straight into place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn

from runner.core.rng import forked
from runner.errors import RunFailed
from runner.families.contract import LoadOptions
from runner.families.parts.attention import Attention, plain_attention, set_attention
from runner.families.parts.checkpoint import Part
from runner.families.parts.layers import Origin
from runner.families.spec import Component, Model
from runner.formats.tensors import read_tensors
from runner.networks.quantize import quantize

_TRANSFORMERS = {
    "CLIPTextModel": "CLIPTextConfig",
    "CLIPTextModelWithProjection": "CLIPTextConfig",
    "T5EncoderModel": "T5Config",
    "LlamaModel": "LlamaConfig",
    "SiglipVisionModel": "SiglipVisionConfig",
}
_OWN = {
    "HunyuanVideoTransformer3DModel": "runner.families.hunyuan_video.transformer:HunyuanVideoTransformer",
    "HunyuanVideoFramepackTransformer3DModel": "runner.families.framepack.transformer:FramepackTransformer",
}
"""Classes of diffusers that are loaded with a forward pass of ours."""


def make_module(cls: str, config: Mapping[str, Any]) -> nn.Module:
    """The module of a class of diffusers or transformers, with weights as it draws them."""
    content: dict[str, Any] = json.loads(json.dumps(dict(config)))
    module: nn.Module
    if cls in _TRANSFORMERS:
        import transformers

        if cls == "SiglipVisionModel":
            content["vision_use_head"] = False
        module = getattr(transformers, cls)(getattr(transformers, _TRANSFORMERS[cls])(**content))
    elif cls in _OWN:
        address, _, name = _OWN[cls].partition(":")
        module = getattr(import_module(address), name).from_config(content)
    else:
        import diffusers

        module = getattr(diffusers, cls).from_config(content)
    return module


def load_part(part: Part, model: Model, options: LoadOptions) -> nn.Module:
    """One component, in eval mode and without gradients: host memory never holds two copies.

    Raises `RunFailed` where the file no longer holds what its header said.
    """
    component = model.components[part.name]
    if options.scratch_seed is not None:
        with forked(options.scratch_seed, "scratch", component.name):
            module = make_module(part.cls, component.config)
        return _finished(module.to(options.device, options.dtype), part, options)
    if options.quantization != "none":
        return _quantized(part, model, options)
    with torch.device("meta"):
        module = make_module(part.cls, component.config)
    shapes = {key: value.shape for key, value in module.state_dict().items()}
    tensors = read_component(component, shapes, options)
    if part.cls == "T5EncoderModel":
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
        if options.dtype == torch.float16:  # its outputs overflow in fp16; transformers keeps these layers in fp32 too
            tensors |= {key: tensor.float() for key, tensor in tensors.items() if ".wo." in key}
    try:
        module.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise RunFailed(f"{component.weights[0]} does not fit the {part.name}: {error}") from None
    if part.cls == "T5EncoderModel":
        cast(Any, module).encoder.embed_tokens.weight = cast(Any, module).shared.weight
    tensors.clear()  # else each stays alive beside its copy in channels_last
    return _finished(module, part, options)


def _quantized(part: Part, model: Model, options: LoadOptions) -> nn.Module:
    """Loaded to the host and packed layer by layer: the device never holds the wide weights."""
    host = replace(options, device=torch.device("cpu"), quantization="none")
    module = load_part(part, model, host)
    quantize(module, options.quantization, part.packs, options.device)
    return module.to(options.device).requires_grad_(False).eval()


def read_component(component: Component, shapes: Mapping[str, torch.Size], options: LoadOptions) -> dict[str, Tensor]:
    """A component's state dict in the module's names."""
    raw: dict[tuple[int, str], Tensor] = {}
    for number, file in enumerate(component.weights):
        wanted = {origin.key for origin in component.keys.values() if origin.file == number and not origin.identity}
        found = read_tensors(file, {key: key for key in wanted}, options.dtype, options.device, mapped=not options.trains)  # fmt: skip
        raw |= {(number, key): tensor for key, tensor in found.items()}
    result: dict[str, Tensor] = {}
    for name, origin in component.keys.items():
        if origin.identity:
            result[name] = torch.eye(*shapes[name], dtype=options.dtype, device=options.device)
            continue
        tensor = from_origin(raw[origin.file, origin.key], origin)
        if name in shapes and tensor.shape != shapes[name]:
            tensor = tensor.reshape(shapes[name])  # a 1x1 convolution that is a linear layer here
        result[name] = tensor
    return result


def from_origin(tensor: Tensor, origin: Origin) -> Tensor:
    """A module's tensor from the one in the file."""
    if origin.parts > 1:
        unit = tensor.shape[0] // origin.parts
        tensor = tensor[origin.part * unit : (origin.part + origin.span) * unit]
    if origin.swapped:
        tensor = torch.cat(tensor.chunk(2)[::-1])
    return tensor.T.contiguous() if origin.transposed else tensor


def _finished(module: Any, part: Part, options: LoadOptions) -> nn.Module:
    if part.cls == "LlamaModel":  # its angles are in no file
        module.rotary_emb = type(module.rotary_emb)(module.config).to(options.device)
    for buffer_name, buffer in list(module.named_buffers()):
        if buffer.is_meta:  # position_ids: not part of any file
            owner, _, last = buffer_name.rpartition(".")
            positions = torch.arange(buffer.shape[-1], device=options.device).expand(buffer.shape)
            module.get_submodule(owner).register_buffer(last, positions, persistent=False)
    if part.cls == "UNet2DConditionModel" and options.device.type == "cuda":  # on a CPU it only takes a copy
        module.to(memory_format=torch.channels_last)
    if part.cls == "AutoencoderKLHunyuanVideo":  # pieces of time would be other numbers than the whole
        module.use_framewise_encoding = module.use_framewise_decoding = False
    eager = options.attention == "eager"
    if part.cls in _OWN:
        set_attention(module, Attention(eager, options.split_attention))
    if eager:
        plain_attention(module)
    finished: nn.Module = module.requires_grad_(False).eval()
    return finished
