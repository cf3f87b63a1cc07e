"""The layers of ChromaTransformer2DModel in the order of the forward pass: FLUX.1's blocks without modulations, which one small
network makes for all of them; torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from runner.families.flux1 import architecture as flux1
from runner.families.flux1.architecture import flux_layers, width_of
from runner.model.layers import Config, Layer

_NOT_HERE = re.compile(r"^time_text_embed\.|^norm_out\.|\.norm1(_context)?\.linear$|\.norm\.linear$")
_NORM = re.compile(r"distilled_guidance_layer\.norms\.(\d{1,4})\.")
APPROXIMATOR = "distilled_guidance_layer"


def chroma_layers(config: Config) -> list[Layer]:
    """The layers of the transformer."""
    blocks = flux_layers({**config, "guidance_embeds": False, "pooled_projection_dim": 1})
    return [*_approximator(config), *(layer for layer in blocks if not _NOT_HERE.search(layer.name))]


def comfyui_layers(config: Config) -> list[Layer]:
    """The same as newer ComfyUI saves them."""
    return [replace(layer, suffix=".{}") for layer in chroma_layers(config)]


def fitted(config: Config, tensors: Mapping[str, Any]) -> Config:
    """The architecture of a file: how many blocks it has, and layers of the approximator."""
    found = {name: value for name, value in flux1.fitted(config, tensors).items() if name != "guidance_embeds"}
    layers = [int(match[1]) + 1 for key in tensors if (match := _NORM.search(key))]
    return {**found, "approximator_layers": max(layers)} if layers else found


def modulations(config: Config) -> int:
    """Vectors that the approximator makes: three of each single-stream block, six of each stream of the others, two of the
    last norm."""
    return int(3 * config["num_single_layers"] + 12 * config["num_layers"] + 2)


def _approximator(config: Config) -> Iterator[Layer]:
    inside = config["approximator_hidden_dim"]
    yield Layer(
        name=f"{APPROXIMATOR}.in_proj",
        original=f"{APPROXIMATOR}.in_proj",
        kind="linear",
        inputs=config["approximator_num_channels"],
        outputs=inside,
    )
    for index in range(config["approximator_layers"]):
        ours = f"{APPROXIMATOR}.layers.{index}"
        yield Layer(name=f"{ours}.linear_1", original=f"{ours}.in_layer", kind="linear", inputs=inside, outputs=inside)
        yield Layer(name=f"{ours}.linear_2", original=f"{ours}.out_layer", kind="linear", inputs=inside, outputs=inside)
        norm = f"{APPROXIMATOR}.norms.{index}"
        yield Layer(name=norm, original=norm, kind="norm", inputs=inside, outputs=inside, bias=False, suffix=".scale")
    yield Layer(
        name=f"{APPROXIMATOR}.out_proj",
        original=f"{APPROXIMATOR}.out_proj",
        kind="linear",
        inputs=inside,
        outputs=width_of(config),
    )
