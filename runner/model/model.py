"""A model as planning and the stages see it: its parts, their files, its sizes; torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from runner.model.layers import Origin

SPIECE = "spiece.model"


class ModelProblem(Exception):
    """Something about the model's files that does not fit what run.toml says at `key` (a path of names)."""

    def __init__(self, key: tuple[str | int, ...], message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.key = key
        self.hint = hint


@dataclass(frozen=True, kw_only=True)
class TokenizerKind:
    """The tokenizer that a text encoder asks for. The words are those of `TEXT`."""

    title: str
    size: int
    """Rows of the encoder's embedding."""
    spare: int
    special: Mapping[str, int | None]
    """Token → its id; None: any."""
    vocabulary: int = 0
    """Of the full-size encoder, whose tokenizer knows the words."""
    words: Mapping[str, int] = field(default_factory=dict)
    encoding: tuple[int, ...] = ()
    """The ids of `TEXT`."""
    load: str = "runner.families.parts.text:load_any"
    """By address: (folder) → tokenizer."""
    alone: str = SPIECE
    """The file that says how words become its tokens where there is no tokenizer.json. Those of merges.txt follow CLIP's
    rules."""


@dataclass(frozen=True, kw_only=True)
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
    tokenizer: TokenizerKind | None = None
    """What tokenizer a text encoder needs."""
    key: str | None = None
    """The key of run.toml that may name other files for it than the checkpoint's."""


@dataclass(frozen=True)
class Denoiser:
    """One of a model's denoisers: it is asked from the timestep `low` on, up to where the next one begins."""

    component: str
    low: float = 0.0


def is_denoiser(component: str) -> bool:
    """Whether a component is a denoiser, by its name: "denoiser", "denoiser_2" and so on."""
    return component.startswith("denoiser")


class Stated(NamedTuple):
    """A value that a checkpoint says, and where."""

    value: Any
    why: str


@dataclass(frozen=True, kw_only=True)
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
    frame_factor: int = 0
    """Frames of one latent frame; 0: the family makes stills."""
    variant: str = ""
    """What the denoiser is used for, where its family has several uses."""
    pipeline: str = ""
    """What model_index.json calls it, where that is not what the shipped one says."""
    window: int = 0
    """Latent frames of one section (framepack)."""
    history: float = 0.0
    """What the denoiser sees beside the frames that it makes, in latent frames of full resolution (framepack)."""
    image_tokens: int = 0
    """Tokens of an image's embedding beside those of the text (framepack)."""
    denoisers: tuple[Denoiser, ...] = (Denoiser("denoiser"),)
    """Which components denoise, and which timesteps of the noise process are whose."""
    stated: Mapping[str, Stated] = field(default_factory=dict)
    """Dotted key of run.toml → what the checkpoint itself says of it."""

    def __post_init__(self) -> None:
        lows = [denoiser.low for denoiser in self.denoisers]
        assert min(lows) == 0 and len(set(lows)) == len(lows), f"the denoisers' timesteps begin at {lows}"
        assert all(is_denoiser(name) for name in self.denoising), f"no names of denoisers: {self.denoising}"

    @property
    def denoising(self) -> tuple[str, ...]:
        """The denoisers' components."""
        return tuple(denoiser.component for denoiser in self.denoisers)

    @property
    def ranges(self) -> list[tuple[str, float, float | None]]:
        """(component, its first timestep, the first one that is the next one's) of each, from little noise to much."""
        own = sorted(self.denoisers, key=lambda denoiser: denoiser.low)
        ends = [*(denoiser.low for denoiser in own[1:]), None]
        return [(denoiser.component, denoiser.low, end) for denoiser, end in zip(own, ends, strict=True)]

    def by_denoiser(self, timesteps: Iterable[float]) -> dict[str, list[int]]:
        """Denoiser → the places of the timesteps that are its own: those for which it is the last that has begun."""
        found: dict[str, list[int]] = {}
        for place, timestep in enumerate(timesteps):
            begun = [denoiser for denoiser in self.denoisers if denoiser.low <= timestep]
            found.setdefault(max(begun, key=lambda denoiser: denoiser.low).component, []).append(place)
        return {name: found[name] for name in self.denoising if name in found}

    def rates(self, given: Mapping[str, bool | float]) -> dict[str, bool | float]:
        """Component → true or its learning rate, of what run.toml says of denoisers in one word."""
        found: dict[str, bool | float] = {}
        for name, value in given.items():
            found |= dict.fromkeys(self.denoising if is_denoiser(name) else (name,), value)
        return found

    @property
    def makes_video(self) -> bool:
        return self.frame_factor > 0

    def latent_shape(self, size: tuple[int, int], frames: int = 1) -> tuple[int, ...]:
        """[C, h, w] of a picture of (width, height), [C, T, h, w] of so many latent frames of a video."""
        height, width = size[1] // self.latent_factor, size[0] // self.latent_factor
        if not self.makes_video:
            return self.latent_channels, height, width
        return self.latent_channels, frames, height, width

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The text encoders that this checkpoint has, in order."""
        return tuple(sorted(name for name in self.components if name.startswith("text_encoder")))
