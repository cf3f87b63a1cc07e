"""Which naming a weights file uses for a component, and what kind of file it is at all; torch-free, from key names only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from runner.families.sd.architecture import Layer, Shape, original_parameters, parameters, renames

Layout = Literal["diffusers", "original"]

_DEPRECATED_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of the autoencoder's attention layers in files written before diffusers 0.18."""

_PREFIXES: dict[str, tuple[tuple[str, Layout], ...]] = {
    "denoiser": (("", "diffusers"), ("model.diffusion_model.", "original"), ("", "original")),
    "vae": (("", "diffusers"), ("first_stage_model.", "original"), ("", "original")),
    "text_encoder_1": (
        ("", "diffusers"),
        ("text_model.", "diffusers"),
        ("cond_stage_model.transformer.", "original"),
        ("cond_stage_model.transformer.", "diffusers"),
        ("text_encoders.clip_l.transformer.text_model.", "diffusers"),
    ),
}


@dataclass(frozen=True)
class Match:
    """A file's keys for one component: key in the file → key of the module, and what does not fit."""

    layout: Layout
    keys: dict[str, str]
    missing: list[str]
    misshapen: list[str]

    @property
    def problem(self) -> str | None:
        """What is wrong, in words; None where every key is there in its shape."""
        if self.missing:
            return f"{len(self.missing)} of its {len(self.missing) + len(self.keys)} tensors are missing ({_some(self.missing)})"
        if self.misshapen:
            return f"{len(self.misshapen)} tensors have another shape ({_some(self.misshapen)})"
        return None


def match_component(component: str, found: Mapping[str, tuple[str, Shape]], layers: list[Layer]) -> Match:
    """The naming that fits best, of those that files of this component use."""
    names = {modern_name(key): key for key in found}
    candidates = []
    for prefix, layout in _PREFIXES[component]:
        if layout == "original":
            shapes, renamed = original_parameters(layers, prefix), renames(layers, prefix)
        else:
            shapes = {prefix + name: shape for name, shape in parameters(layers).items()}
            renamed = {name: name[len(prefix) :] for name in shapes}
        keys = {names[key]: renamed[key] for key in shapes if key in names}
        missing = [key for key in shapes if key not in names]
        misshapen = [
            f"{names[key]} is {list(found[names[key]][1])}, not {list(shape)}"
            for key, shape in shapes.items()
            if key in names and _squeezed(found[names[key]][1]) != _squeezed(shape)
        ]
        candidates.append(Match(layout, keys, missing, misshapen))
    return max(candidates, key=lambda match: len(match.keys))


def modern_name(key: str) -> str:
    """The key with today's names of attention layers."""
    if ".attentions." not in key:
        return key
    head, _, parameter = key.rpartition(".")
    stem, _, last = head.rpartition(".")
    return f"{stem}.{_DEPRECATED_ATTENTION[last]}.{parameter}" if last in _DEPRECATED_ATTENTION else key


def _squeezed(shape: Shape) -> Shape:
    """A 1x1 convolution's shape as a linear layer's: files differ in this for the attention of the autoencoder."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def identify(keys: Iterable[str]) -> str | None:
    """What a file that is no SD 1.5 checkpoint is, in words; None where it looks like one or is unknown."""
    keys = list(keys)

    def has(*parts: str) -> bool:
        return any(part in key for key in keys for part in parts)

    if has(".lora_down.", ".lora_A.", ".lora_up.", ".hada_w1_a", ".lokr_w1"):
        return "a LoRA file, not a checkpoint"
    if has("joint_blocks."):
        return "a Stable Diffusion 3 checkpoint"
    if has("conditioner.embedders.1.", "label_emb.", "add_embedding.linear_1"):
        return "an SDXL checkpoint"
    if has("cond_stage_model.model."):
        return "a Stable Diffusion 2 checkpoint"
    if has("double_blocks.", "single_transformer_blocks."):
        return "a checkpoint of the Flux or HunyuanVideo kind"
    if has("control_model.", "controlnet_cond_embedding"):
        return "a ControlNet"
    if not has("diffusion_model.", "input_blocks.", "down_blocks."):
        if has("encoder.down"):
            return "an autoencoder only"
        if has("text_model.", "token_embedding"):
            return "a text encoder only"
    return None
