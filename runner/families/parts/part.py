"""A component of a family as data: its class, its files' names, its repeated blocks; torch-free.

Code that needs torch is named by its address ("package.module:name"), which `pkgutil.resolve_name` looks up where it is wanted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

from runner.families.locate import KeyPath
from runner.model.layers import Config, Layer, Layers
from runner.model.model import TokenizerKind


@dataclass(frozen=True)
class Naming:
    """A way that files name a component: behind `prefix`, in the module's own names or in the original ones."""

    prefix: str
    layout: Literal["diffusers", "original"] = "original"
    layers: Layers | None = None
    """Layers with other original names than the part's own."""


@dataclass(frozen=True, kw_only=True)
class ModuleClass:
    """How the modules of a class are counted, built, loaded, finished, given attention, tiled and saved.

    What nothing is said of is as for a class of diffusers; `transformers_class` makes one of transformers.
    """

    name: str
    """What configurations in files call it."""
    layers: Layers
    """Its layers with weights: what memory, parameters, adapters and the names in files are counted and made from."""
    _: KW_ONLY
    build: str = "runner.families.parts.modules:from_diffusers"
    """(this, configuration) → module with weights as it draws them."""
    source: str = ""
    """The class that is built, where it is not the library's own of this name."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What is set in every configuration."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Name of a tensor in the module → the one that it is the same as; files hold one of them or both."""
    float32: re.Pattern[str] | None = None
    """Tensors that stay in fp32 where the others are in fp16."""
    finish: str | None = None
    """(module, LoadOptions) → None, after the weights are in: what no file holds, memory formats, switches."""
    attention: str = "runner.families.parts.attention:diffusers_attention"
    """(module, Attention) → None: has it compute attention in that way."""
    recompute: str = "runner.families.parts.modules:recompute_diffusers"
    """(module) → None: gradient checkpointing of its repeated blocks."""
    tile: str | None = None
    """Of an autoencoder: (module, side of its tiles in pixels or None, width of its strips or None) → None."""
    frames: Callable[[Layer, int], int] | None = None
    """Of an autoencoder of videos: (layer, frames of the video) → frames that the layer sees."""
    adaptable: re.Pattern[str] = re.compile("")
    """Its linear layers and convolutions that adapters can be for."""
    old_names: Mapping[str, str] = field(default_factory=dict)
    """Last part of a layer's name in older files → in the module."""
    tokenizer: Callable[[Config], TokenizerKind] | None = None
    """Of a text encoder: its configuration → the tokenizer that it needs."""
    model_type: str | None = None
    """What transformers calls its architecture; None: it is saved as diffusers saves its own."""
    outer: str = ""
    """What its names begin with in the files that are written."""


def transformers_class(name: str, layers: Layers, model_type: str, **more: Any) -> ModuleClass:
    """A class of transformers."""
    return ModuleClass(
        name=name,
        layers=layers,
        model_type=model_type,
        **{
            "build": "runner.families.parts.modules:from_transformers",
            "attention": "runner.families.parts.attention:transformers_attention",
            "recompute": "runner.families.parts.modules:recompute_transformers",
            **more,
        },
    )


@dataclass(frozen=True, kw_only=True)
class Part:
    """A component of a family: its folder in a diffusers directory, its class and its namings.

    The first naming of layout "original" is the one that single files are written in.
    """

    name: str
    folder: str
    module: ModuleClass
    namings: tuple[Naming, ...]
    key: KeyPath | None = None
    """The key of run.toml that names another file for it."""
    same_as: str = ""
    """The folder of the part with the same architecture, whose configuration counts where it has none of its own."""
    optional: bool = False
    block: re.Pattern[str] = re.compile(r"(encoder\.(layers|block)\.\d+)\.")
    """What the name of a layer inside one of its repeated blocks begins with; the first group is the block's."""

    wide: re.Pattern[str] | None = None
    """Linear layers inside the blocks that quantization leaves as they are."""
    fitted: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]] | None = None
    """(shipped configuration, tensors of a file without one) → the configuration of what the file holds."""

    def packs(self, layer: str) -> bool:
        """Whether quantization packs a linear layer."""
        return self.block_of(layer) is not None and not (self.wide and self.wide.search(layer))

    def block_of(self, layer: str) -> str | None:
        """The repeated block that a layer is in, by name; blocks are quantized, checkpointed, swapped and compiled."""
        match = self.block.search(layer)
        return match.group(1) if match is not None else None

    @property
    def saved(self) -> Naming | None:
        """How single files are written; None: they do not hold this part."""
        return next((naming for naming in self.namings if naming.layout == "original"), None)
