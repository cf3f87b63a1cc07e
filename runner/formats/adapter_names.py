"""The keys of adapter files: which module and tensor each is of, and which layers of a model that module is; torch-free.

A key is a module's name and a tensor's. What tools write:
modules: Kohya's `lora_unet_<path with _>`, OneTrainer's `lora_transformer_…`, LyCORIS' `lycoris_…`, sd-scripts' `oft_unet_…`,
ComfyUI's and diffusion-pipe's `diffusion_model.<path>`, diffusers' `unet.…` and `transformer.…`, peft's `base_model.model.…`,
HunyuanVideo's `Hunyuan_video_I2V_lora_…`, OMI's `clip_l.…`, a path alone; the path in diffusers' names or in the original
ones, where OMI's and OneTrainer's say which part of a fused module they mean (`qkv.0`).
tensors: see `_TENSORS`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from runner.model.targets import Alias, Target
from runner.networks.shapes import BIASES

_HALVES = {"down": "lora_A", "up": "lora_B", "mid": "lora_mid", "A": "lora_A", "B": "lora_B"}
_HALVES |= {name: f"glora_{name}" for name in ("a1", "a2", "b1", "b2")}
_TENSORS = re.compile(
    r"(?:\.lora_(?P<kohya>down|up|mid)\.weight"
    r"|(?:_lora|\.lora|\.lora_linear_layer)\.(?P<diffusers>down|up)\.weight"  # of diffusers before peft
    r"|\.lora_(?P<peft>[AB])(?:\.[^.]+)?\.weight|\.lora_(?P<bare>[AB])"
    r"|\.(?P<glora>[ab][12])\.weight"
    r"|\.(?P<named>lora_magnitude_vector|oft_R)(?:\.[^.]+){0,2}"
    r"|\.(?P<own>alpha|dora_scale|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)"
    r"|oft_blocks|rescale|diff|diff_b|w_norm|b_norm)(?:\.default)?)$"
)
# T5 behind CLIP-L alone (FLUX.1) is the second encoder, and the third one in Kohya's names.
_TEXT_ENCODERS = {
    "text_encoder_1": ("lora_te1_", "lora_te_", "text_encoder.", "text_encoders.clip_l.transformer.", "clip_l."),
    "text_encoder_2": (
        "lora_te2_",
        "lora_te3_",
        "text_encoder_2.",
        "text_encoders.clip_g.transformer.",
        "clip_g.",
        "text_encoders.t5xxl.transformer.",
        "t5.",
    ),
    "text_encoder_3": ("lora_te3_", "text_encoder_3.", "text_encoders.t5xxl.transformer.", "t5."),
}
_PREFIXES = {
    "denoiser": (
        "lora_unet_",
        "lora_transformer_",
        "lycoris_",
        "oft_unet_",
        "Hunyuan_video_I2V_lora_",
        "model.diffusion_model.",
        "diffusion_model.",
        "unet.",
        "transformer.",
        "",
    ),
    **_TEXT_ENCODERS,
}
_SEVERAL = re.compile(r"(denoiser)(_\d+)")
"""Denoisers beside the first one: what files call them has their number too, as in `transformer_2.` and `lora_unet_2_`."""
_PEFT = "base_model.model."
_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""What diffusers' first files call the attention layers of text encoders."""
EMBEDDING = "bundle_emb."
"""Before the keys of textual inversions that lie in an adapter's file."""
ADAPTER_METADATA = "lora_adapter_metadata"
"""The key under which diffusers looks for rank and alpha; without it a file is loaded with alpha = rank."""
DORA_NORM = "runner.dora_norm"
"""The metadata key that says "base" where a DoRA file is for ComfyUI, which divides by the length of the base's rows."""
SCALED: Mapping[str, str] = {"lora": "lora_B", "dora": "lora_B", "loha": "hada_w1_a", "lokr": "lokr_w1"}
"""The factor that takes a change of the scale, by kind; a rotation has none."""


@dataclass(frozen=True)
class Module:
    """One module of a file: name of each tensor → key, and the layers of the model that it is.

    The layers' `part`, `span` and `swapped` say which of its rows they are; they are in the order of these rows.
    """

    name: str
    keys: Mapping[str, str]
    layers: tuple[Target, ...]

    @property
    def parameters(self) -> set[str]:
        """What it changes of each layer: "weight", "bias"."""
        return {"bias" if name in BIASES else "weight" for name in self.keys}

    @property
    def fused(self) -> bool:
        """Whether it is not just one layer as it is."""
        return self.layers[0].part[1] > 1 or self.layers[0].swapped


@dataclass(frozen=True)
class Parsed:
    """What a file holds for a model: the modules that are layers of it, those that are not, and keys that are of no
    module."""

    modules: list[Module]
    strange: list[str]
    """Modules that the model has not."""
    keys: list[str]
    """Keys that are no tensor of an adapter."""
    doubled: list[tuple[str, str]]
    """Two keys for one tensor, or two modules for one layer."""


def is_adapter_file(keys: Iterable[str]) -> bool:
    """Whether a file has any keys of adapters."""
    return any(_split(key)[1] not in (None, "alpha") for key in keys)


def _split(key: str) -> tuple[str, str | None]:
    """(module, tensor); no tensor where the key is of no form that is known."""
    found = None if key.startswith(EMBEDDING) else _TENSORS.search(key)
    if found is None or not found.start():
        return key, None
    module, name = key[: found.start()], next(value for value in found.groupdict().values() if value is not None)
    if name == "diff" and module.endswith(".bias"):  # ComfyUI names parameters too
        return module.removesuffix(".bias"), "diff_b"
    return module.removesuffix(".weight") if name == "diff" else module, _HALVES.get(name, name)


def parse(keys: Iterable[str], layers: Sequence[Target]) -> Parsed:
    """Finds the modules of a file's adapters among a model's layers."""
    modules: dict[str, dict[str, str]] = {}
    unknown: list[str] = []
    doubled: list[tuple[str, str]] = []
    for key in keys:
        module, name = _split(key)
        if name is None:
            unknown.append(key)
        elif name in modules.setdefault(module, {}):
            doubled.append((modules[module][name], key))
        else:
            modules[module][name] = key
    index: dict[tuple[str, str], list[tuple[Target, Alias]]] = {}
    for layer in layers:
        for alias in layer.aliases:
            index.setdefault((layer.component, alias.module), []).append((layer, alias))
    prefixes = {component: _prefixes(component) for component in dict.fromkeys(layer.component for layer in layers)}
    found: list[Module] = []
    strange: list[str] = []
    owners: dict[tuple[str, str], str] = {}
    for module, own in modules.items():
        pieces = _layers_of(module, index, prefixes)
        if not pieces:
            strange.append(module)
            continue
        found.append(Module(module, own, pieces))
        for piece, parameter in product(pieces, found[-1].parameters):
            other = owners.setdefault((piece.full_name, parameter), module)
            if other != module and (other, module) not in doubled:
                doubled.append((other, module))
    return Parsed(found, sorted(strange), unknown, doubled)


def _layers_of(
    module: str, index: Mapping[tuple[str, str], list[tuple[Target, Alias]]], prefixes: Mapping[str, Sequence[str]]
) -> tuple[Target, ...]:
    module = module.removeprefix(_PEFT)
    for component, own in prefixes.items():
        for prefix in own:
            if not module.startswith(prefix):
                continue
            path = module.removeprefix(prefix).removeprefix(_PEFT).replace(".processor.", ".").replace(".", "_")
            for name in _spellings(path):
                found = index.get((component, name))
                if found is not None:
                    pieces = [
                        replace(layer, part=alias.part, span=alias.span, swapped=alias.swapped)
                        for layer, alias in found
                    ]
                    return tuple(sorted(pieces, key=lambda piece: piece.part))
    return ()


def _prefixes(component: str) -> Sequence[str]:
    """What files put before the names of a component's layers."""
    several = _SEVERAL.fullmatch(component)
    if several is None:
        return _PREFIXES.get(component, ())
    return [f"{prefix[:-1]}{several[2]}{prefix[-1]}" for prefix in _PREFIXES[several[1]] if prefix]


def _spellings(path: str) -> list[str]:
    """The path as it is and, where it is that of a file from before peft, in today's names."""
    stem, _, last = path.rpartition("_to_")
    today = _ATTENTION.get(f"to_{last}")
    older = [f"{stem}_{today}"] if stem and today else []
    return [path, *([f"{path}_0"] if last == "out" else []), *older]
