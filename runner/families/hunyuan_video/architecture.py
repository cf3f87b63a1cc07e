"""The layers of HunyuanVideo's transformer (arXiv 2412.03603) in the order of the forward pass; torch-free.

FramePack has the same blocks. In the original layout q, k and v are one tensor, in the single-stream blocks together with
the MLP's first layer, and the final modulation's shift and scale stand the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from runner.families.parts.layers import Config, Layer

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
        "x_embedder.proj", "img_in.proj", "conv", config["in_channels"], width, patch, depth=config["patch_size_t"]
    )
    yield from _condition(config, width)
    yield from _refiner(config, width)
    for index in range(config["num_layers"]):
        yield from _double(index, config, width)
    for index in range(config["num_single_layers"]):
        yield from _single(index, config, width)
    yield Layer("norm_out.linear", "final_layer.adaLN_modulation.1", "linear", width, 2 * width, swapped=True)
    outputs = patch**2 * config["patch_size_t"] * (config["out_channels"] or config["in_channels"])
    yield Layer("proj_out", "final_layer.linear", "linear", width, outputs)


def _condition(config: Config, width: int) -> Iterator[Layer]:
    embedders = [("timestep_embedder", "time_in.mlp.0", "time_in.mlp.2", 256)]
    embedders += [("guidance_embedder", "guidance_in.mlp.0", "guidance_in.mlp.2", 256)] * bool(
        config["guidance_embeds"]
    )
    embedders += [("text_embedder", "vector_in.in_layer", "vector_in.out_layer", config["pooled_projection_dim"])]
    for name, first, second, inputs in embedders:
        yield Layer(f"time_text_embed.{name}.linear_1", first, "linear", inputs, width)
        yield Layer(f"time_text_embed.{name}.linear_2", second, "linear", width, width)


def _refiner(config: Config, width: int) -> Iterator[Layer]:
    text = config["text_embed_dim"]
    for name, first, second, inputs in (
        ("timestep_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2", 256),
        ("text_embedder", "c_embedder.linear_1", "c_embedder.linear_2", text),
    ):
        yield Layer(f"context_embedder.time_text_embed.{name}.linear_1", f"txt_in.{first}", "linear", inputs, width)
        yield Layer(f"context_embedder.time_text_embed.{name}.linear_2", f"txt_in.{second}", "linear", width, width)
    yield Layer("context_embedder.proj_in", "txt_in.input_embedder", "linear", text, width)
    for index in range(config["num_refiner_layers"]):
        ours = f"context_embedder.token_refiner.refiner_blocks.{index}"
        original = f"txt_in.individual_token_refiner.blocks.{index}"
        yield Layer(f"{ours}.norm1", f"{original}.norm1", "norm", width, width)
        for part, name in enumerate(("to_q", "to_k", "to_v")):
            yield Layer(f"{ours}.attn.{name}", f"{original}.self_attn_qkv", "linear", width, width, part=(part, 3))
        yield Layer(f"{ours}.attn.to_out.0", f"{original}.self_attn_proj", "linear", width, width)
        yield Layer(f"{ours}.norm2", f"{original}.norm2", "norm", width, width)
        yield Layer(f"{ours}.ff.net.0.proj", f"{original}.mlp.fc1", "linear", width, 4 * width)
        yield Layer(f"{ours}.ff.net.2", f"{original}.mlp.fc2", "linear", 4 * width, width)
        yield Layer(f"{ours}.norm_out.linear", f"{original}.adaLN_modulation.1", "linear", width, 2 * width)


def _double(index: int, config: Config, width: int) -> Iterator[Layer]:
    ours, original = f"transformer_blocks.{index}", f"double_blocks.{index}"
    head, inner = config["attention_head_dim"], _inner(config, width)
    yield Layer(f"{ours}.norm1.linear", f"{original}.img_mod.linear", "linear", width, 6 * width)
    yield Layer(f"{ours}.norm1_context.linear", f"{original}.txt_mod.linear", "linear", width, 6 * width)
    for names, norms, stream, last in (
        (("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "img", "to_out.0"),
        (("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"), "txt", "to_add_out"),
    ):
        for part, name in enumerate(names):
            yield Layer(f"{ours}.attn.{name}", f"{original}.{stream}_attn_qkv", "linear", width, width, part=(part, 3))
        for norm, letter in zip(norms, "qk", strict=True):
            yield Layer(
                f"{ours}.attn.{norm}", f"{original}.{stream}_attn_{letter}_norm", "norm", head, head, bias=False
            )
        yield Layer(f"{ours}.attn.{last}", f"{original}.{stream}_attn_proj", "linear", width, width)
    for name, stream in (("ff", "img"), ("ff_context", "txt")):
        yield Layer(f"{ours}.{name}.net.0.proj", f"{original}.{stream}_mlp.fc1", "linear", width, inner)
        yield Layer(f"{ours}.{name}.net.2", f"{original}.{stream}_mlp.fc2", "linear", inner, width)


def _single(index: int, config: Config, width: int) -> Iterator[Layer]:
    ours, original = f"single_transformer_blocks.{index}", f"single_blocks.{index}"
    head, inner = config["attention_head_dim"], _inner(config, width)
    ratio = inner // width
    yield Layer(f"{ours}.norm.linear", f"{original}.modulation.linear", "linear", width, 3 * width)
    for part, name in enumerate(("to_q", "to_k", "to_v")):
        yield Layer(f"{ours}.attn.{name}", f"{original}.linear1", "linear", width, width, part=(part, 3 + ratio))
    for norm, letter in (("norm_q", "q"), ("norm_k", "k")):
        yield Layer(f"{ours}.attn.{norm}", f"{original}.{letter}_norm", "norm", head, head, bias=False)
    yield Layer(f"{ours}.proj_mlp", f"{original}.linear1", "linear", width, inner, part=(3, 3 + ratio), span=ratio)
    yield Layer(f"{ours}.proj_out", f"{original}.linear2", "linear", width + inner, width)


def _inner(config: Config, width: int) -> int:
    """Width inside the MLPs, a whole multiple of the width."""
    ratio = float(config["mlp_ratio"])
    if ratio != int(ratio):
        raise ValueError(f"mlp_ratio {ratio} is no whole number")
    return width * int(ratio)


_COMFYUI = (
    (r"mlp\.fc1$", "mlp.0"), (r"mlp\.fc2$", "mlp.2"), (r"(_mod|\.modulation)\.linear$", r"\1.lin"),
    (r"(_in|t_embedder)\.mlp\.0$", r"\1.in_layer"), (r"(_in|t_embedder)\.mlp\.2$", r"\1.out_layer"),
    (r"c_embedder\.linear_1$", "c_embedder.in_layer"), (r"c_embedder\.linear_2$", "c_embedder.out_layer"),
    (r"(_attn|blocks\.\d+)[_.]q_norm$", r"\1.norm.query_norm.scale"),
    (r"(_attn|blocks\.\d+)[_.]k_norm$", r"\1.norm.key_norm.scale"),
)  # fmt: skip


def comfyui_layer(original: str) -> str:
    """What the layer is called in ComfyUI's own class, which renames as it loads (but for dots: `img_attn.qkv`)."""
    for pattern, name in _COMFYUI:
        original = re.sub(pattern, name, original)
    return original
