"""How modules of diffusers and of transformers are built and finished: the code that `ModuleClass` names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

import torch
from torch import nn

from runner.families.contract import LoadOptions
from runner.families.parts.part import ModuleClass


def make_module(kind: ModuleClass, config: Mapping[str, Any]) -> nn.Module:
    """A module of a class, with weights as it draws them."""
    module: nn.Module = resolve_name(kind.build)(kind, json.loads(json.dumps({**config, **kind.settings})))
    return module


def from_diffusers(kind: ModuleClass, config: dict[str, Any]) -> nn.Module:
    module: nn.Module = resolve_name(kind.source or f"diffusers:{kind.name}").from_config(config)
    return module


def from_transformers(kind: ModuleClass, config: dict[str, Any]) -> nn.Module:
    cls = resolve_name(kind.source or f"transformers:{kind.name}")
    module: nn.Module = cls(cls.config_class(**config))
    return module


def recompute_diffusers(module: Any) -> None:
    module.enable_gradient_checkpointing()


def recompute_transformers(module: Any) -> None:
    module.gradient_checkpointing_enable()


def fill_positions(module: nn.Module, options: LoadOptions) -> None:
    """Numbers the positions, which are in no file."""
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta and name.endswith("position_ids"):
            owner, _, last = name.rpartition(".")
            positions = torch.arange(buffer.shape[-1], device=options.device).expand(buffer.shape)
            module.get_submodule(owner).register_buffer(last, positions, persistent=False)


def fill_angles(module: Any, options: LoadOptions) -> None:
    """Makes LLaMA's rotary angles, which are in no file."""
    module.rotary_emb = type(module.rotary_emb)(module.config).to(options.device)


def channels_last(module: nn.Module, options: LoadOptions) -> None:
    """Convolutions of a GPU are faster so; on a CPU it only takes a copy."""
    if options.device.type == "cuda":
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
