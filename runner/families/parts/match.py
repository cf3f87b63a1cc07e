"""Holds the names and shapes in a file against the layers of a component; torch-free."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any, Literal

from runner.families.parts.part import ModuleClass, Naming, Part
from runner.model.layers import Layer, Layers, Origin, Shape, original_parameters, origins, parameters
from runner.model.model import Component


def frozen(config: Mapping[str, Any]) -> str:
    return json.dumps(dict(config), sort_keys=True)


@cache
def listed(make: Layers, config: str) -> list[Layer]:
    return make(json.loads(config))


def layers_of(part: Part, component: Component) -> list[Layer]:
    """The layers of a component of a model."""
    return listed(part.module.layers, frozen(component.config))


@dataclass(frozen=True)
class Match:
    """A file's keys for one component: key of the module → where it is in the file, and what does not fit."""

    layout: Literal["diffusers", "original"]
    keys: dict[str, Origin]
    missing: list[str]
    misshapen: list[str]

    @property
    def problem(self) -> str | None:
        """What is wrong, in words; None where every key is there in its shape."""
        if self.missing:
            total = len(self.missing) + len({origin.key for origin in self.keys.values()})
            return f"{len(self.missing)} of its {total} tensors are missing ({_some(self.missing)})"
        if self.misshapen:
            return f"{len(self.misshapen)} tensors have another shape ({_some(self.misshapen)})"
        return None


def match_part(part: Part, config: Mapping[str, Any], found: Mapping[str, tuple[str, Shape]]) -> Match:
    """The naming that fits best, of those that files of this component use."""
    kind = part.module
    names = {_modern_name(key, kind): key for key in found}
    candidates = [
        _match(naming, kind, listed(naming.layers or kind.layers, frozen(config)), found, names)
        for naming in part.namings
    ]
    return max(candidates, key=lambda match: len(match.keys))


def _match(
    naming: Naming,
    kind: ModuleClass,
    layers: list[Layer],
    found: Mapping[str, tuple[str, Shape]],
    names: Mapping[str, str],
) -> Match:
    if naming.layout == "original":
        shapes, sources = original_parameters(layers, naming.prefix), origins(layers, naming.prefix)
    else:
        shapes = {naming.prefix + name: shape for name, shape in parameters(layers).items()}
        sources = {name: Origin(key=naming.prefix + name) for name in parameters(layers)}
    replaced = {own: tied for tied, own in kind.tied.items() if naming.prefix + own not in names}
    at = {key: names.get(key) or names.get(_aliased(key, naming.prefix, replaced)) for key in shapes}
    identities = {layer.key("weight") for layer in layers if layer.identity}
    keys: dict[str, Origin] = {}
    missing: list[str] = []
    for name, origin in sources.items():
        place = at[origin.key]
        if place is not None:
            keys[name] = replace(origin, key=place)
        elif name not in identities and origin.key not in missing:
            missing.append(origin.key)
    if keys:
        keys |= {name: Origin(key="", identity=True) for name in identities - keys.keys()}
    misshapen = [
        f"{place} is {list(found[place][1])}, not {list(shapes[key])}"
        for key, place in at.items()
        if place is not None and _squeezed(found[place][1]) != _squeezed(shapes[key])
    ]
    return Match(naming.layout, keys, missing, misshapen)


_SCALES = (".scale_weight", ".weight_scale")
"""What fp8 files call the scale of a layer's weight: ComfyUI's older way, and its newer one."""
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def scales(tensors: Mapping[str, tuple[str, Shape]], keys: Collection[str]) -> dict[str, str] | str:
    """Key of a weight that was divided by a scale → the scale's key; or why these tensors cannot be read as numbers."""
    found = {}
    for key in keys:
        dtype, shape = tensors[key]
        if dtype not in _FLOATS:
            return f"{key} holds {dtype}, packed in a way that is not read here"
        layer = key.removesuffix(".weight")
        name = next((layer + ending for ending in _SCALES if layer + ending in tensors), None) if layer != key else None
        if name is None:
            continue
        kind, size = tensors[name]
        if kind not in _FLOATS or prod(size) not in (1, shape[0]):
            return f"{name} is {kind} {list(size)}, no scale of {key} {list(shape)}"
        found[key] = name
    return found


def _aliased(key: str, prefix: str, aliases: Mapping[str, str]) -> str:
    return prefix + aliases.get(key.removeprefix(prefix), key.removeprefix(prefix))


def _modern_name(key: str, kind: ModuleClass) -> str:
    """The key with today's name of its layer."""
    if not kind.old_names:
        return key
    head, _, parameter = key.rpartition(".")
    last = head.rpartition(".")[2]
    return f"{head.removesuffix(last)}{kind.old_names[last]}.{parameter}" if last in kind.old_names else key


def _squeezed(shape: Shape) -> Shape:
    """A 1x1 convolution's shape as a linear layer's: files differ in this for the attention of the autoencoder."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
