"""Loads a component with torch: its weights are read straight into place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pkgutil import resolve_name

import torch
from torch import Tensor, nn

from runner.errors import RunFailed
from runner.families.contract import LoadOptions
from runner.families.parts.attention import Attention
from runner.families.parts.modules import make_module
from runner.families.parts.part import Part
from runner.model.layers import Origin
from runner.model.model import Component, Model
from runner.networks.quantize import quantize
from runner.rng import forked
from runner.weights.tensors import read_tensors


def load_part(part: Part, model: Model, options: LoadOptions) -> nn.Module:
    """One component, in eval mode and without gradients: host memory never holds two copies.

    Raises `RunFailed` where the file no longer holds what its header said.
    """
    component = model.components[part.name]
    if options.scratch_seed is not None:
        with forked(options.scratch_seed, "scratch", component.name):
            module = make_module(part.module, component.config)
        return _finished(module.to(options.device, options.dtype), part, options)
    if options.quantization != "none":
        return _quantized(part, model, options)
    with torch.device("meta"):
        module = make_module(part.module, component.config)
    shapes = {key: value.shape for key, value in module.state_dict().items()}
    tensors = read_component(component, shapes, options)
    tied = part.module.tied
    tensors |= {name: tensors[own] for name, own in tied.items()}
    if part.module.float32 is not None and options.dtype == torch.float16:
        tensors |= {key: tensor.float() for key, tensor in tensors.items() if part.module.float32.search(key)}
    try:
        module.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise RunFailed(f"{component.weights[0]} does not fit the {part.name}: {error}") from None
    for name, own in tied.items():  # assigned by itself, each is a parameter of its own
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, module.get_parameter(own))
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
        found = read_tensors(
            file, {key: key for key in wanted}, options.dtype, options.device, mapped=not options.trains
        )
        raw |= {(number, key): tensor for key, tensor in found.items()}
        scaled = {o.key: o.scale for o in component.keys.values() if o.file == number and o.scale}
        factors = read_tensors(file, {key: key for key in scaled.values()}, torch.float32, options.device)
        for key, name in scaled.items():  # fp8 is exact in any wider dtype; the product is rounded once
            wide = raw[number, key].float()
            factor = (
                factors[name].reshape(-1, *[1] * (wide.dim() - 1))
                if factors[name].numel() > 1
                else factors[name].reshape(())
            )
            raw[number, key] = wide.mul_(factor).to(options.dtype)
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


def _finished(module: nn.Module, part: Part, options: LoadOptions) -> nn.Module:
    kind = part.module
    if kind.finish is not None:
        resolve_name(kind.finish)(module, options)
    if options.device.type != "meta":
        left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
        assert not left, f"{left[0]} of {kind.name} is in no file, and its `finish` does not make it"
    resolve_name(kind.attention)(module, Attention(options.attention == "eager", options.split_attention))
    return module.requires_grad_(False).eval()
