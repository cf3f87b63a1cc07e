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

from runner.model.layers import Config, Layer

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
    yield Layer(name="x_embedder", original="img_in", kind="linear", inputs=config["in_channels"], outputs=width)
    embedders = [("timestep_embedder", "time_in", 256)]
    embedders += [("guidance_embedder", "guidance_in", 256)] * bool(config["guidance_embeds"])
    embedders += [("text_embedder", "vector_in", config["pooled_projection_dim"])]
    for name, original, inputs in embedders:
        yield Layer(
            name=f"time_text_embed.{name}.linear_1",
            original=f"{original}.in_layer",
            kind="linear",
            inputs=inputs,
            outputs=width,
        )
        yield Layer(
            name=f"time_text_embed.{name}.linear_2",
            original=f"{original}.out_layer",
            kind="linear",
            inputs=width,
            outputs=width,
        )
    yield Layer(
        name="context_embedder", original="txt_in", kind="linear", inputs=config["joint_attention_dim"], outputs=width
    )
    for index in range(config["num_layers"]):
        yield from _double(index, config, width)
    for index in range(config["num_single_layers"]):
        yield from _single(index, config, width)
    yield Layer(
        name="norm_out.linear",
        original="final_layer.adaLN_modulation.1",
        kind="linear",
        inputs=width,
        outputs=2 * width,
        swapped=True,
    )
    outputs = config["patch_size"] ** 2 * (config.get("out_channels") or config["in_channels"])
    yield Layer(name="proj_out", original="final_layer.linear", kind="linear", inputs=width, outputs=outputs)


def _double(index: int, config: Config, width: int) -> Iterator[Layer]:
    ours, original, head = f"transformer_blocks.{index}", f"double_blocks.{index}", config["attention_head_dim"]
    yield Layer(
        name=f"{ours}.norm1.linear", original=f"{original}.img_mod.lin", kind="linear", inputs=width, outputs=6 * width
    )
    yield Layer(
        name=f"{ours}.norm1_context.linear",
        original=f"{original}.txt_mod.lin",
        kind="linear",
        inputs=width,
        outputs=6 * width,
    )
    for names, norms, stream, last in (
        (("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "img", "to_out.0"),
        (("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"), "txt", "to_add_out"),
    ):
        attention = f"{original}.{stream}_attn"
        for part, name in enumerate(names):
            yield Layer(
                name=f"{ours}.attn.{name}",
                original=f"{attention}.qkv",
                kind="linear",
                inputs=width,
                outputs=width,
                part=(part, 3),
            )
        yield from _norms(f"{ours}.attn", norms, attention, head)
        yield Layer(
            name=f"{ours}.attn.{last}", original=f"{attention}.proj", kind="linear", inputs=width, outputs=width
        )
    for name, stream in (("ff", "img"), ("ff_context", "txt")):
        yield Layer(
            name=f"{ours}.{name}.net.0.proj",
            original=f"{original}.{stream}_mlp.0",
            kind="linear",
            inputs=width,
            outputs=MLP * width,
        )
        yield Layer(
            name=f"{ours}.{name}.net.2",
            original=f"{original}.{stream}_mlp.2",
            kind="linear",
            inputs=MLP * width,
            outputs=width,
        )


def _single(index: int, config: Config, width: int) -> Iterator[Layer]:
    ours, original = f"single_transformer_blocks.{index}", f"single_blocks.{index}"
    yield Layer(
        name=f"{ours}.norm.linear",
        original=f"{original}.modulation.lin",
        kind="linear",
        inputs=width,
        outputs=3 * width,
    )
    for part, name in enumerate(("to_q", "to_k", "to_v")):
        yield Layer(
            name=f"{ours}.attn.{name}",
            original=f"{original}.linear1",
            kind="linear",
            inputs=width,
            outputs=width,
            part=(part, 3 + MLP),
        )
    yield from _norms(f"{ours}.attn", ("norm_q", "norm_k"), original, config["attention_head_dim"])
    inner = MLP * width
    yield Layer(
        name=f"{ours}.proj_mlp",
        original=f"{original}.linear1",
        kind="linear",
        inputs=width,
        outputs=inner,
        part=(3, 3 + MLP),
        span=MLP,
    )
    yield Layer(
        name=f"{ours}.proj_out", original=f"{original}.linear2", kind="linear", inputs=width + inner, outputs=width
    )


def _norms(ours: str, names: tuple[str, str], original: str, head: int) -> Iterator[Layer]:
    for name, old in zip(names, ("query_norm", "key_norm"), strict=True):
        yield Layer(
            name=f"{ours}.{name}",
            original=f"{original}.norm.{old}",
            kind="norm",
            inputs=head,
            outputs=head,
            bias=False,
            suffix=".scale",
        )
