"""What every stage runs with: the family, the store, the device, the log, and whether it was asked to stop."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from runner.core.events import Events
from runner.core.precision import DTYPES
from runner.core.process import give_back_memory
from runner.errors import Invalid
from runner.families.contract import Family, LoadOptions
from runner.formats.adapter_read import read_lora
from runner.inputs.runtime import Runtime
from runner.model.model import is_denoiser
from runner.model.numerics import Numerics
from runner.networks.merge import merge_into
from runner.stages.stop import StopFlag
from runner.store.store import Store


@dataclass(kw_only=True)
class Context:
    """Shared by the stages of one apply."""

    family: Family
    store: Store
    runtime: Runtime
    numerics: Numerics
    device: torch.device
    events: Events
    stop: StopFlag = field(default_factory=StopFlag)

    def load(
        self, component: str, *, whole: torch.dtype | None = None, scratch_seed: int | None = None, plain: bool = False
    ) -> nn.Module:
        """One component in the dtype of frozen weights, with network.base_weights merged in; in that of `whole` where it
        trains whole. `plain`: not quantized."""
        numerics = self.numerics
        quantization = numerics.quantization if is_denoiser(component) else numerics.text_encoder_quantization
        frozen = self.numerics.vae_dtype if component == "vae" else self.numerics.dtype
        options = LoadOptions(
            dtype=whole or DTYPES[frozen],
            device=self.device,
            attention=self.runtime.attention,
            scratch_seed=scratch_seed,
            trains=whole is not None,
            quantization="none" if plain or whole is not None or component == "vae" else quantization,
            split_attention=self.runtime.split_attention,
        )
        module = self.family.load(self.runtime.model, component, options)
        if component not in self.family.picture_parts:
            self._merge_base_weights(component, module)
        return module

    def _merge_base_weights(self, component: str, module: nn.Module) -> None:
        """Merges network.base_weights into a component: everything that runs it sees the merged weights."""
        for file, multiplier in self.runtime.base_weights:
            lora = read_lora(file, self.runtime.layers, multiplier)
            merge_into({component: module}, lora.changes)

    def free(self) -> None:
        """Gives memory back after a component was dropped."""
        gc.collect()
        give_back_memory()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def choose_device(name: str) -> torch.device:
    """The device of run.device. Raises `Invalid` where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            found = "PyTorch finds no GPU" if count == 0 else f"there are only {count} GPUs"
            raise Invalid(f"run.device is {name}, but {found}", hint="`runner doctor` shows what is there")
    return device


def on_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}
