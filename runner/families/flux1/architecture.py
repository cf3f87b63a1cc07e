"""The layers of FluxTransformer2DModel in the order of the forward pass; torch-free.

In the original layout q, k and v are one tensor, in the single-stream blocks together with the MLP's first layer, and the
final modulation's shift and scale stand the other way round. The scales of the norms of q and k end in `.scale`; files of
newer ComfyUI have `.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from runner.families.parts.layers import Config, Layer

BLOCK = r"^((?:single_)?transformer_blocks\.\d+)\."
"""What the name of a layer inside one of the double- or single-stream blocks begins with."""
MLP = 4
"""Width inside the MLPs, in widths of a token."""
_NUMBERED = re.compile(
    r"(?:^|\.)(double_blocks|transformer_blocks|single_blocks|single_transformer_blocks)\.(\d{1,4})\."
)


def flux_layers(config: Config) -> list[Layer]:
    """The layers of the transformer."""
    return list(_transformer(config))


def comfyui_layers(config: Config) -> list[Layer]:
    """The same as newer ComfyUI saves them."""
    return [replace(layer, suffix=".{}") for layer in flux_layers(config)]


def fitted(config: Config, tensors: Mapping[str, Any]) -> Config:
    """The architecture of a file: how many blocks it has (pruned models have fewer), and whether it is told guidance."""
    blocks: dict[str, int] = {}
    for key in tensors:
        match = _NUMBERED.search(key)
        if match is not None:
            kind = "num_single_layers" if match[1].startswith("single") else "num_layers"
            blocks[kind] = max(blocks.get(kind, 0), int(match[2]) + 1)
    guided = any("guidance_in." in key or "guidance_embedder." in key for key in tensors)
    return {**config, **blocks, "guidance_embeds": guided} if blocks else config


def width_of(config: Config) -> int:
    """Numbers of one token inside the transformer."""
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def _transformer(config: Config) -> Iterator[Layer]:
    width = width_of(config)
    yield Layer("x_embedder", "img_in", "linear", config["in_channels"], width)
    embedders = [("timestep_embedder", "time_in", 256)]
    embedders += [("guidance_embedder", "guidance_in", 256)] * bool(config["guidance_embeds"])
    embedders += [("text_embedder", "vector_in", config["pooled_projection_dim"])]
    for name, original, inputs in embedders:
        yield Layer(f"time_text_embed.{name}.linear_1", f"{original}.in_layer", "linear", inputs, width)
        yield Layer(f"time_text_embed.{name}.linear_2", f"{original}.out_layer", "linear", width, width)
    yield Layer("context_embedder", "txt_in", "linear", config["joint_attention_dim"], width)
    for index in range(config["num_layers"]):
        yield from _double(index, config, width)
    for index in range(config["num_single_layers"]):
        yield from _single(index, config, width)
    yield Layer("norm_out.linear", "final_layer.adaLN_modulation.1", "linear", width, 2 * width, swapped=True)
    outputs = config["patch_size"] ** 2 * (config.get("out_channels") or config["in_channels"])
    yield Layer("proj_out", "final_layer.linear", "linear", width, outputs)


def _double(index: int, config: Config, width: int) -> Iterator[Layer]:
    ours, original, head = f"transformer_blocks.{index}", f"double_blocks.{index}", config["attention_head_dim"]
    yield Layer(f"{ours}.norm1.linear", f"{original}.img_mod.lin", "linear", width, 6 * width)
    yield Layer(f"{ours}.norm1_context.linear", f"{original}.txt_mod.lin", "linear", width, 6 * width)
    for names, norms, stream, last in (
        (("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "img", "to_out.0"),
        (("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"), "txt", "to_add_out"),
    ):
        attention = f"{original}.{stream}_attn"
        for part, name in enumerate(names):
            yield Layer(f"{ours}.attn.{name}", f"{attention}.qkv", "linear", width, width, part=(part, 3))
        yield from _norms(f"{ours}.attn", norms, attention, head)
        yield Layer(f"{ours}.attn.{last}", f"{attention}.proj", "linear", width, width)
    for name, stream in (("ff", "img"), ("ff_context", "txt")):
        yield Layer(f"{ours}.{name}.net.0.proj", f"{original}.{stream}_mlp.0", "linear", width, MLP * width)
        yield Layer(f"{ours}.{name}.net.2", f"{original}.{stream}_mlp.2", "linear", MLP * width, width)


def _single(index: int, config: Config, width: int) -> Iterator[Layer]:
    ours, original = f"single_transformer_blocks.{index}", f"single_blocks.{index}"
    yield Layer(f"{ours}.norm.linear", f"{original}.modulation.lin", "linear", width, 3 * width)
    for part, name in enumerate(("to_q", "to_k", "to_v")):
        yield Layer(f"{ours}.attn.{name}", f"{original}.linear1", "linear", width, width, part=(part, 3 + MLP))
    yield from _norms(f"{ours}.attn", ("norm_q", "norm_k"), original, config["attention_head_dim"])
    inner = MLP * width
    yield Layer(f"{ours}.proj_mlp", f"{original}.linear1", "linear", width, inner, part=(3, 3 + MLP), span=MLP)
    yield Layer(f"{ours}.proj_out", f"{original}.linear2", "linear", width + inner, width)


def _norms(ours: str, names: tuple[str, str], original: str, head: int) -> Iterator[Layer]:
    for name, old in zip(names, ("query_norm", "key_norm"), strict=True):
        yield Layer(f"{ours}.{name}", f"{original}.norm.{old}", "norm", head, head, bias=False, suffix=".scale")
