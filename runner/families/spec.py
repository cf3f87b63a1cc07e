"""The torch-free half of a family: what planning needs to know of it and of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from runner.families.parts.layers import Origin
from schemas import RunConfig


class ModelProblem(Exception):
    """Something about the model's files that does not fit what run.toml says at `key` (a path of names)."""

    def __init__(self, key: tuple[str | int, ...], message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.key = key
        self.hint = hint


@dataclass(frozen=True)
class Component:
    """A part of the model: where its bytes lie, what it is made of and how large it is.

    `files` are all files whose content decides its weights, the configuration among them.
    `layout` tells how its keys are named in those files: diffusers' names, or the family's original ones.
    """

    name: str
    weights: tuple[Path, ...]
    files: tuple[Path, ...]
    layout: Literal["diffusers", "original", "none"]
    config: Mapping[str, Any]
    parameters: int
    keys: Mapping[str, Origin] = field(default_factory=dict)
    """Key in diffusers' and transformers' own naming → where it is in the files."""


@dataclass(frozen=True)
class Model:
    """A checkpoint as far as its headers and configurations tell."""

    family: str
    components: Mapping[str, Component]
    tokenizers: Mapping[str, Path | None]
    """Text encoder → folder of its tokenizer; None is the built-in CLIP tokenizer."""
    tokenizer_files: tuple[Path, ...]
    scheduler: Mapping[str, Any]
    native_size: int
    """Side in pixels that the model was made for."""
    latent_factor: int
    latent_channels: int
    bucket_step: int
    size_multiple: int
    text_tokens: int
    """Tokens that the denoiser sees of one caption."""
    text_width: int
    """Numbers of one token, of all encoders together."""
    text_extra: int
    """Numbers of one caption beside its tokens (pooled embeddings)."""
    label: str

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The text encoders that this checkpoint has, in order."""
        return tuple(sorted(name for name in self.components if name.startswith("text_encoder")))


Adapter = Literal["lora", "dora", "loha", "lokr", "oft"]


@dataclass(frozen=True)
class Target:
    """A layer that gets an adapter: its component and diffusers name, its size, its rank and alpha.

    The adapter's output is scaled by alpha / rank (rslora is already in alpha).
    """

    component: str
    name: str
    kind: Literal["linear", "conv"]
    inputs: int
    outputs: int
    kernel: int
    rank: int
    alpha: float
    kohya: str
    """The module's name in Kohya's files: `lora_unet_down_blocks_0_…`."""
    diffusers: str
    """The module's name in diffusers' files: `unet.down_blocks.0.…`."""
    adapter: Adapter = "lora"
    part: tuple[int, int] = (0, 1)
    """Which of the equal blocks of rows of Kohya's module this layer is: its q, k and v are one."""
    swapped: bool = False
    """The halves of the rows stand the other way round in Kohya's module."""
    tied: bool = False
    """The layers of one module of Kohya's share their first factor."""

    @property
    def full_name(self) -> str:
        return f"{self.component}.{self.name}"

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Defaults:
    """What a family says where run.toml says nothing."""

    dtype: str
    num_inference_steps: int
    cfg_scale: float
    sampler: str
    dialect: str
    prediction_type: str | None = None
    """What the denoiser predicts, where its family decides it."""
    clip_skip: int = 1
    max_token_length: int = 75
    timestep_sampling: str = "uniform"
    timestep_shift: float = 1.0


@dataclass(frozen=True)
class MemoryQuestion:
    """What predicted memory depends on."""

    model: Model
    trains: Mapping[str, bool]
    """Component → whether it trains whole (True) or carries an adapter (False); frozen ones are absent."""
    trainable: int
    frozen_bytes: int
    """Bytes of one frozen weight."""
    vae_bytes: int
    """Bytes of one weight of the autoencoder."""
    compute_bytes: int
    """Bytes of one activation."""
    optimizer_bytes: float
    """Bytes of optimizer state for one trained number."""
    ema: bool
    batch: int
    size: tuple[int, int]
    checkpointing: bool
    eager_attention: bool
    latent_batch: int
    text_batch: int
    text_tokens: int
    encodes_latents: bool
    encodes_text: bool
    sample_size: tuple[int, int] | None
    samples_in_training: bool
    latents_cached: bool = True
    text_cached: bool = True
    targets: Mapping[str, int] = field(default_factory=dict)
    """`component.layer` → rank, of each layer with an adapter."""
    device: Literal["cpu", "cuda"] = "cpu"
    quantization: str = "none"
    text_encoder_quantization: str = "none"
    whole_bytes: int = 4
    """Bytes of one weight that trains whole."""
    blocks_to_swap: int = 0
    fused_backward: bool = False
    activation_offload: bool = False
    optimizer_offload: bool = False
    vae_tile: int | None = None

    @property
    def whole(self) -> bool:
        """Whether components train whole, not through adapters."""
        return any(self.trains.values())


@dataclass(frozen=True)
class MemoryAnswer:
    """Predicted peak bytes of each phase, above what the libraries themselves take."""

    phases: Mapping[str, int]

    @property
    def peak(self) -> int:
        return max(self.phases.values(), default=0)


@dataclass(frozen=True)
class FamilySpec:
    """A family's torch-free bundle."""

    name: str
    title: str
    architecture: str
    """Its name in Stability's modelspec."""
    base_version: str
    """Its name in Kohya's ss_base_model_version."""
    defaults: Defaults
    inspect: Callable[[RunConfig, Path], Model]
    """(configuration, folder of run.toml) → model. Raises `ModelProblem` for files that do not fit."""
    targets: Callable[[RunConfig, Model], list[Target]]
    layers: Callable[[Model], list[Target]]
    """Every layer that an adapter of a file may be for; rank and alpha say nothing."""
    memory: Callable[[MemoryQuestion], MemoryAnswer]
    blocks: Callable[[Model], tuple[str, ...]]
    """The denoiser's repeated blocks in the order of the forward pass."""
    samplers: tuple[str, ...]
    token_lengths: tuple[int, ...]
    """What max_token_length may be."""
    refused_keys: Mapping[str, str] = field(default_factory=dict)
    """Dotted key → why this family cannot use it."""
