"""Which layers get adapters, and what they are called in files of adapters; torch-free."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from runner.families.parts.match import layers_of
from runner.families.parts.part import Part
from runner.model.layers import Layer, Layers
from runner.model.model import Model, ModelProblem, is_denoiser
from runner.model.targets import Alias, Target
from runner.patterns import Search
from schemas import RunConfig
from schemas.network import Network

_CONVOLUTIONAL = re.compile(r"\.(resnets|downsamplers|upsamplers)\.")
"""The layers that conv_rank adds, as in Kohya's conv_dim."""
PROJECTION = "text_projection"
"""The last layer of text encoders that have one. OneTrainer trains it, Kohya's tools do not: only where a pattern names it."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """What a component's layers are called in files: prefixes, and whether Kohya's names come from the original ones."""

    kohya: str
    diffusers: str
    by_original: bool = False
    separate: str = ""
    """What files of LyCORIS' kinds put before the diffusers name of a part of a fused module; empty: they name none."""
    comfyui: Callable[[str], str] | None = None
    """Original name → ComfyUI's, where it does not know Kohya's."""


@dataclass(frozen=True)
class Preset:
    """A set of the denoiser's layers by name. `fused`: adapters of a fused q, k, v share their first factor, as in Kohya's."""

    chosen: re.Pattern[str]
    fused: bool = False


@dataclass(frozen=True, kw_only=True)
class Adaptable:
    """The layers of a family that adapters can be for."""

    parts: tuple[Part, ...]
    names: Mapping[str, Names]
    presets: Mapping[str, Preset]
    example: str
    """A layer's name, for messages."""
    convolutional: bool = field(default=False)
    sister: Layers | None = None
    """The denoiser's layers with the original names of a related family, whose adapters fit this one too."""
    comfyui: Callable[[str], str] | None = None
    """Original name of one of the denoiser's layers → ComfyUI's, where that is another."""

    def targets(self, config: RunConfig, model: Model) -> list[Target]:
        """The layers that get adapters: the default set, a preset, or those whose names match. Raises `ModelProblem`."""
        network = config.network
        if network is None:
            return []
        if network.conv_rank is not None and not self.convolutional:
            raise ModelProblem(
                ("network", "conv_rank"),
                f"the denoiser of family {model.family} has no residual convolutions",
                "take conv_rank out",
            )
        found: list[Target] = []
        named = _naming(PROJECTION, network)
        search = Search((*network.rank_pattern, *network.alpha_pattern))
        for part in self.parts:
            if not config.training.components.of(part.name) or part.name not in model.components:
                continue
            layers = self._layers(part, model, bool(named))
            fused = False
            if is_denoiser(part.name):
                layers, fused = self._chosen(layers, network)
            aliases = self._aliases(part, model)
            found += _untied(
                [self._adapted(part.name, layer, network, fused, aliases[layer.name], search) for layer in layers]
            )
        if named and not any(target.name == PROJECTION for target in found):
            raise ModelProblem(
                ("network", "targets", named[0]),
                f"no text encoder that trains has a {PROJECTION}",
                "let the one that has it train: [training.components] text_encoder_2 = true",
            )
        for name, patterns in (("rank_pattern", network.rank_pattern), ("alpha_pattern", network.alpha_pattern)):
            for pattern in patterns:
                if not any(search.matches(pattern, target.name) for target in found):
                    raise ModelProblem(
                        ("network", name, pattern), f"{pattern!r} matches none of the {len(found)} layers with adapters"
                    )
        return found

    def layers(self, model: Model) -> list[Target]:
        """Every layer that a file may have something for, norms and embeddings too; rank and alpha say nothing."""
        return [
            self._target(part.name, layer, "lora", 1, 1.0, False, aliases[layer.name])
            for part in self.parts
            if part.name in model.components
            for aliases in (self._aliases(part, model),)
            for layer in layers_of(part, model.components[part.name])
            if layer.kind != "table"
        ]

    def _aliases(self, part: Part, model: Model) -> dict[str, tuple[Alias, ...]]:
        """Layer → its names in files: diffusers', the original one, ComfyUI's, OMI's, and those of the related family."""
        config = model.components[part.name].config
        own = layers_of(part, model.components[part.name])
        denoiser = is_denoiser(part.name)
        sisters = {layer.name: layer for layer in self.sister(config)} if self.sister and denoiser else {}
        found = {}
        for layer in own:
            aliases = [Alias(_plain(layer.name))]
            if not denoiser:  # CLIP's outer name came and went with versions of transformers
                aliases += [Alias(_plain(layer.name).removeprefix("text_model_")), Alias(_plain(layer.original))]
            elif layer.name in sisters or layer.original:
                layer = sisters.get(layer.name, layer)
                names = {layer.original, self.comfyui(layer.original) if self.comfyui else layer.original}
                aliases += [Alias(_plain(name), layer.part, layer.span, layer.swapped) for name in sorted(names)]
                if layer.part[1] > 1:  # OMI's names have each part of a fused module by itself
                    aliases += [
                        Alias(f"{_plain(name)}_{layer.part[0]}", swapped=layer.swapped) for name in sorted(names)
                    ]
            found[layer.name] = tuple(dict.fromkeys(alias for alias in aliases if alias.module))
        return found

    def _layers(self, part: Part, model: Model, projections: bool = False) -> list[Layer]:
        """The layers that can get adapters. `projections`: those of text encoders too."""
        return [
            layer
            for layer in layers_of(part, model.components[part.name])
            if layer.kind in ("linear", "conv")
            and not layer.depth
            and (part.module.adaptable.search(layer.name) or (projections and layer.name == PROJECTION))
        ]

    def _chosen(self, layers: list[Layer], network: Network) -> tuple[list[Layer], bool]:
        fused = False
        if isinstance(network.targets, list):
            search = Search(network.targets)
            chosen = [layer for layer in layers if search.any(layer.name)]
            for index, pattern in enumerate(network.targets):
                if PROJECTION not in pattern and not any(search.matches(pattern, layer.name) for layer in layers):
                    raise ModelProblem(
                        ("network", "targets", index),
                        f"{pattern!r} matches no layer of the denoiser",
                        f"a layer's name looks like {self.example}",
                    )
        elif network.targets in self.presets:
            preset = self.presets[network.targets]
            chosen, fused = [layer for layer in layers if preset.chosen.search(layer.name)], preset.fused
        else:
            raise ModelProblem(
                ("network", "targets"),
                f'there is no preset "{network.targets}"',
                f"presets are {', '.join(self.presets)}; regular expressions stand in a list",
            )
        if network.conv_rank is not None:
            named = {layer.name for layer in chosen}
            chosen = [layer for layer in layers if layer.name in named or _CONVOLUTIONAL.search(layer.name)]
        if not chosen:
            raise ModelProblem(("network", "targets"), "no layer is left to train")
        return chosen, fused

    def _adapted(
        self, component: str, layer: Layer, network: Network, fused: bool, aliases: tuple[Alias, ...], search: Search
    ) -> Target:
        def matching(patterns: Mapping[str, Any]) -> Any:
            return next((value for text, value in patterns.items() if search.matches(text, layer.name)), None)

        convolutional = layer.kernel > 1
        rank = matching(network.rank_pattern)
        if rank is None:
            rank = network.conv_rank if convolutional and network.conv_rank is not None else network.rank
        alpha = matching(network.alpha_pattern)
        if alpha is None:
            alpha = network.conv_alpha if convolutional and network.conv_rank is not None else network.alpha
        alpha = float(rank if alpha is None else alpha)
        if network.rslora:  # alpha / sqrt(rank) is the scale: every reader divides by the rank
            alpha *= rank**0.5
        tied = fused and network.type == "lora"
        return self._target(component, layer, network.type, rank, alpha, tied, aliases)

    def _target(
        self,
        component: str,
        layer: Layer,
        adapter: Any,
        rank: int,
        alpha: float,
        fused: bool,
        aliases: tuple[Alias, ...],
    ) -> Target:
        assert layer.kind != "table"
        names = self.names[component]
        module = layer.original if names.by_original else layer.name
        own = names.by_original and (layer.part[1] > 1 or layer.swapped)
        return Target(
            component=component,
            name=layer.name,
            kind=layer.kind,
            inputs=layer.inputs,
            outputs=layer.outputs,
            kernel=layer.kernel,
            rank=rank,
            alpha=alpha,
            kohya=names.kohya + module.replace(".", "_"),
            diffusers=names.diffusers + layer.name,
            adapter=adapter,
            part=layer.part if names.by_original else (0, 1),
            span=layer.span if names.by_original else 1,
            swapped=names.by_original and layer.swapped,
            tied=fused and layer.part[1] > 1,
            aliases=aliases,
            bias=layer.bias and layer.kind != "embedding",
            depth=layer.depth,
            comfyui=names.comfyui(layer.original) if names.comfyui is not None else "",
            separate=names.separate + layer.name.replace(".", "_") if own and names.separate else "",
        )


def _plain(name: str) -> str:
    return name.replace(".", "_")


def _naming(layer: str, network: Network) -> list[int]:
    """The places in network.targets of the patterns that name a layer."""
    return (
        [index for index, pattern in enumerate(network.targets) if layer in pattern]
        if isinstance(network.targets, list)
        else []
    )


def _untied(targets: list[Target]) -> list[Target]:
    """Layers of one module whose ranks differ cannot share their first factor."""
    ranks: dict[str, set[int]] = {}
    for target in targets:
        ranks.setdefault(target.kohya, set()).add(target.rank)
    return [replace(target, tied=False) if len(ranks[target.kohya]) > 1 else target for target in targets]
