"""The layers of HunyuanVideo's transformer (arXiv 2412.03603) in the order of the forward pass; torch-free.

FramePack has the same blocks. In the original layout q, k and v are one tensor, in the single-stream blocks together with
the MLP's first layer, and the final modulation's shift and scale stand the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from runner.model.layers import Config, Layer

BLOCK = r"^((?:single_)?transformer_blocks\.\d+)\."
"""What the name of a layer inside one of the double- or single-stream blocks begins with."""


def hunyuan_layers(config: Config) -> list[Layer]:
    """The layers of a HunyuanVideoTransformer3DModel."""
    return list(_transformer(config))


def width_of(config: Config) -> int:
    """Numbers of one token inside the transformer."""
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def _transformer(config: Config) -> Iterator[Layer]:
    width, patch = width_of(config), config["patch_size"]
    yield Layer(
        name="x_embedder.proj",
        original="img_in.proj",
        kind="conv",
        inputs=config["in_channels"],
        outputs=width,
        kernel=patch,
        depth=config["patch_size_t"],
    )
    yield from _condition(config, width)
    yield from _refiner(config, width)
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
    outputs = patch**2 * config["patch_size_t"] * (config["out_channels"] or config["in_channels"])
    yield Layer(name="proj_out", original="final_layer.linear", kind="linear", inputs=width, outputs=outputs)


def _condition(config: Config, width: int) -> Iterator[Layer]:
    embedders = [("timestep_embedder", "time_in.mlp.0", "time_in.mlp.2", 256)]
    embedders += [("guidance_embedder", "guidance_in.mlp.0", "guidance_in.mlp.2", 256)] * bool(
        config["guidance_embeds"]
    )
    embedders += [("text_embedder", "vector_in.in_layer", "vector_in.out_layer", config["pooled_projection_dim"])]
    for name, first, second, inputs in embedders:
        yield Layer(
            name=f"time_text_embed.{name}.linear_1", original=first, kind="linear", inputs=inputs, outputs=width
        )
        yield Layer(
            name=f"time_text_embed.{name}.linear_2", original=second, kind="linear", inputs=width, outputs=width
        )


def _refiner(config: Config, width: int) -> Iterator[Layer]:
    text = config["text_embed_dim"]
    for name, first, second, inputs in (
        ("timestep_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2", 256),
        ("text_embedder", "c_embedder.linear_1", "c_embedder.linear_2", text),
    ):
        yield Layer(
            name=f"context_embedder.time_text_embed.{name}.linear_1",
            original=f"txt_in.{first}",
            kind="linear",
            inputs=inputs,
            outputs=width,
        )
        yield Layer(
            name=f"context_embedder.time_text_embed.{name}.linear_2",
            original=f"txt_in.{second}",
            kind="linear",
            inputs=width,
            outputs=width,
        )
    yield Layer(
        name="context_embedder.proj_in", original="txt_in.input_embedder", kind="linear", inputs=text, outputs=width
    )
    for index in range(config["num_refiner_layers"]):
        ours = f"context_embedder.token_refiner.refiner_blocks.{index}"
        original = f"txt_in.individual_token_refiner.blocks.{index}"
        yield Layer(name=f"{ours}.norm1", original=f"{original}.norm1", kind="norm", inputs=width, outputs=width)
        for part, name in enumerate(("to_q", "to_k", "to_v")):
            yield Layer(
                name=f"{ours}.attn.{name}",
                original=f"{original}.self_attn_qkv",
                kind="linear",
                inputs=width,
                outputs=width,
                part=(part, 3),
            )
        yield Layer(
            name=f"{ours}.attn.to_out.0",
            original=f"{original}.self_attn_proj",
            kind="linear",
            inputs=width,
            outputs=width,
        )
        yield Layer(name=f"{ours}.norm2", original=f"{original}.norm2", kind="norm", inputs=width, outputs=width)
        yield Layer(
            name=f"{ours}.ff.net.0.proj", original=f"{original}.mlp.fc1", kind="linear", inputs=width, outputs=4 * width
        )
        yield Layer(
            name=f"{ours}.ff.net.2", original=f"{original}.mlp.fc2", kind="linear", inputs=4 * width, outputs=width
        )
        yield Layer(
            name=f"{ours}.norm_out.linear",
            original=f"{original}.adaLN_modulation.1",
            kind="linear",
            inputs=width,
            outputs=2 * width,
        )


def _double(index: int, config: Config, width: int) -> Iterator[Layer]:
    ours, original = f"transformer_blocks.{index}", f"double_blocks.{index}"
    head, inner = config["attention_head_dim"], _inner(config, width)
    yield Layer(
        name=f"{ours}.norm1.linear",
        original=f"{original}.img_mod.linear",
        kind="linear",
        inputs=width,
        outputs=6 * width,
    )
    yield Layer(
        name=f"{ours}.norm1_context.linear",
        original=f"{original}.txt_mod.linear",
        kind="linear",
        inputs=width,
        outputs=6 * width,
    )
    for names, norms, stream, last in (
        (("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "img", "to_out.0"),
        (("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"), "txt", "to_add_out"),
    ):
        for part, name in enumerate(names):
            yield Layer(
                name=f"{ours}.attn.{name}",
                original=f"{original}.{stream}_attn_qkv",
                kind="linear",
                inputs=width,
                outputs=width,
                part=(part, 3),
            )
        for norm, letter in zip(norms, "qk", strict=True):
            yield Layer(
                name=f"{ours}.attn.{norm}",
                original=f"{original}.{stream}_attn_{letter}_norm",
                kind="norm",
                inputs=head,
                outputs=head,
                bias=False,
            )
        yield Layer(
            name=f"{ours}.attn.{last}",
            original=f"{original}.{stream}_attn_proj",
            kind="linear",
            inputs=width,
            outputs=width,
        )
    for name, stream in (("ff", "img"), ("ff_context", "txt")):
        yield Layer(
            name=f"{ours}.{name}.net.0.proj",
            original=f"{original}.{stream}_mlp.fc1",
            kind="linear",
            inputs=width,
            outputs=inner,
        )
        yield Layer(
            name=f"{ours}.{name}.net.2",
            original=f"{original}.{stream}_mlp.fc2",
            kind="linear",
            inputs=inner,
            outputs=width,
        )


def _single(index: int, config: Config, width: int) -> Iterator[Layer]:
    ours, original = f"single_transformer_blocks.{index}", f"single_blocks.{index}"
    head, inner = config["attention_head_dim"], _inner(config, width)
    ratio = inner // width
    yield Layer(
        name=f"{ours}.norm.linear",
        original=f"{original}.modulation.linear",
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
            part=(part, 3 + ratio),
        )
    for norm, letter in (("norm_q", "q"), ("norm_k", "k")):
        yield Layer(
            name=f"{ours}.attn.{norm}",
            original=f"{original}.{letter}_norm",
            kind="norm",
            inputs=head,
            outputs=head,
            bias=False,
        )
    yield Layer(
        name=f"{ours}.proj_mlp",
        original=f"{original}.linear1",
        kind="linear",
        inputs=width,
        outputs=inner,
        part=(3, 3 + ratio),
        span=ratio,
    )
    yield Layer(
        name=f"{ours}.proj_out", original=f"{original}.linear2", kind="linear", inputs=width + inner, outputs=width
    )


def _inner(config: Config, width: int) -> int:
    """Width inside the MLPs, a whole multiple of the width."""
    ratio = float(config["mlp_ratio"])
    if ratio != int(ratio):
        raise ValueError(f"mlp_ratio {ratio} is no whole number")
    return width * int(ratio)


_COMFYUI = (
    (r"mlp\.fc1$", "mlp.0"),
    (r"mlp\.fc2$", "mlp.2"),
    (r"(_mod|\.modulation)\.linear$", r"\1.lin"),
    (r"(_in|t_embedder)\.mlp\.0$", r"\1.in_layer"),
    (r"(_in|t_embedder)\.mlp\.2$", r"\1.out_layer"),
    (r"c_embedder\.linear_1$", "c_embedder.in_layer"),
    (r"c_embedder\.linear_2$", "c_embedder.out_layer"),
    (r"(_attn|blocks\.\d+)[_.]q_norm$", r"\1.norm.query_norm.scale"),
    (r"(_attn|blocks\.\d+)[_.]k_norm$", r"\1.norm.key_norm.scale"),
)


def comfyui_layer(original: str) -> str:
    """What the layer is called in ComfyUI's own class, which renames as it loads (but for dots: `img_attn.qkv`)."""
    for pattern, name in _COMFYUI:
        original = re.sub(pattern, name, original)
    return original
