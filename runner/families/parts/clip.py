"""The layers of CLIP text encoders and of T5's encoder, from their configurations; torch-free.

`clip_layers` has the names of transformers 4 as original names (what files use); `open_clip_layers` has OpenCLIP's, where
q, k and v are one tensor and the projection is transposed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from runner.model.layers import Config, Layer

_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_TOP = {
    "embeddings.token_embedding": ("token_embedding", ".{}"),
    "embeddings.position_embedding": ("positional_embedding", ""),
    "final_layer_norm": ("ln_final", ".{}"),
}


def clip_layers(config: Config) -> list[Layer]:
    """The layers of a CLIPTextModel."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    layers = [
        _clip("embeddings.token_embedding", "embedding", config["vocab_size"], width),
        _clip("embeddings.position_embedding", "embedding", config["max_position_embeddings"], width),
    ]
    for index in range(config["num_hidden_layers"]):
        block = f"encoder.layers.{index}"
        layers += [
            _clip(f"{block}.self_attn.{part}", "linear", width, width)
            for part in ("k_proj", "v_proj", "q_proj", "out_proj")
        ]
        layers += [
            _clip(f"{block}.layer_norm1", "norm", width, width),
            _clip(f"{block}.mlp.fc1", "linear", width, inner),
            _clip(f"{block}.mlp.fc2", "linear", inner, width),
            _clip(f"{block}.layer_norm2", "norm", width, width),
        ]
    return [*layers, _clip("final_layer_norm", "norm", width, width)]


def _clip(name: str, kind: Literal["linear", "norm", "embedding"], inputs: int, outputs: int) -> Layer:
    if kind == "embedding":
        inputs, outputs = outputs, inputs  # its weight is [rows, width]
    return Layer(name=name, original=f"text_model.{name}", kind=kind, inputs=inputs, outputs=outputs)


def projected_clip_layers(config: Config) -> list[Layer]:
    """The layers of a CLIPTextModelWithProjection. A file without the projection means the identity, as in ComfyUI."""
    width, projected = config["hidden_size"], config["projection_dim"]
    own = [replace(layer, name=f"text_model.{layer.name}") for layer in clip_layers(config)]
    projection = Layer(
        name="text_projection",
        original="text_projection",
        kind="linear",
        inputs=width,
        outputs=projected,
        bias=False,
        identity=width == projected,
    )
    return [*own, projection]


def open_clip_layers(config: Config) -> list[Layer]:
    """The same module in OpenCLIP's names."""
    return [_open_clip(layer) for layer in projected_clip_layers(config)]


def _open_clip(layer: Layer) -> Layer:
    if layer.name == "text_projection":
        return replace(layer, suffix="", transposed=True, identity=False)
    name = layer.name.removeprefix("text_model.")
    if name in _OPEN_CLIP_TOP:
        original, suffix = _OPEN_CLIP_TOP[name]
        return replace(layer, original=original, suffix=suffix)
    _, _, index, rest = name.split(".", 3)
    block = f"transformer.resblocks.{index}"
    if rest in _OPEN_CLIP:
        return replace(layer, original=f"{block}.{_OPEN_CLIP[rest]}")
    part = ("q_proj", "k_proj", "v_proj").index(rest.removeprefix("self_attn."))
    return replace(layer, original=f"{block}.attn.in_proj", suffix="_{}", part=(part, 3))


def t5_layers(config: Config) -> list[Layer]:
    """The layers of a T5EncoderModel (v1.1: gated GELU). Its files use the same names."""
    return [replace(layer, original=layer.name) for layer in _t5(config)]


def _t5(config: Config) -> Iterator[Layer]:
    width, inner = config["d_model"], config["d_ff"]
    heads = config["num_heads"]
    attention = heads * config["d_kv"]

    def linear(name: str, inputs: int, outputs: int) -> Layer:
        return Layer(name=name, original=name, kind="linear", inputs=inputs, outputs=outputs, bias=False)

    yield Layer(name="shared", original="", kind="embedding", inputs=width, outputs=config["vocab_size"])
    for index in range(config["num_layers"]):
        block = f"encoder.block.{index}"
        for part in ("q", "k", "v"):
            yield linear(f"{block}.layer.0.SelfAttention.{part}", width, attention)
        yield linear(f"{block}.layer.0.SelfAttention.o", attention, width)
        if index == 0:
            name = f"{block}.layer.0.SelfAttention.relative_attention_bias"
            yield Layer(
                name=name, original="", kind="embedding", inputs=heads, outputs=config["relative_attention_num_buckets"]
            )
        yield Layer(
            name=f"{block}.layer.0.layer_norm", original="", kind="norm", inputs=width, outputs=width, bias=False
        )
        yield linear(f"{block}.layer.1.DenseReluDense.wi_0", width, inner)
        yield linear(f"{block}.layer.1.DenseReluDense.wi_1", width, inner)
        yield linear(f"{block}.layer.1.DenseReluDense.wo", inner, width)
        yield Layer(
            name=f"{block}.layer.1.layer_norm", original="", kind="norm", inputs=width, outputs=width, bias=False
        )
    yield Layer(name="encoder.final_layer_norm", original="", kind="norm", inputs=width, outputs=width, bias=False)
