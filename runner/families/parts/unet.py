"""The layers of the U-Net of Stable Diffusion 1.5 and XL, from its configuration; torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from runner.families.parts.layers import Config, Layer, per_block


def unet_layers(config: Config) -> list[Layer]:
    """The layers of a UNet2DConditionModel, in the order of the forward pass."""
    return list(_unet(config))


def _unet(config: Config) -> Iterator[Layer]:
    channels: list[int] = list(config["block_out_channels"])
    blocks = len(channels)
    residuals = per_block(config.get("layers_per_block", 2), blocks)
    context = config["cross_attention_dim"]
    depth = per_block(config.get("transformer_layers_per_block", 1), blocks)
    linear = bool(config.get("use_linear_projection", False))
    embedding = channels[0] * 4
    yield Layer("conv_in", "input_blocks.0.0", "conv", config["in_channels"], channels[0], 3)
    yield Layer("time_embedding.linear_1", "time_embed.0", "linear", channels[0], embedding)
    yield Layer("time_embedding.linear_2", "time_embed.2", "linear", embedding, embedding)
    if config.get("addition_embed_type") == "text_time":
        added = config["projection_class_embeddings_input_dim"]
        yield Layer("add_embedding.linear_1", "label_emb.0.0", "linear", added, embedding)
        yield Layer("add_embedding.linear_2", "label_emb.0.2", "linear", embedding, embedding)

    skips = [channels[0]]
    position, width = 1, channels[0]
    for index, kind in enumerate(config["down_block_types"]):
        for layer in range(residuals[index]):
            place, original = f"down_blocks.{index}", f"input_blocks.{position}"
            yield from _residual(f"{place}.resnets.{layer}", f"{original}.0", width, channels[index], embedding, index)
            width = channels[index]
            if "CrossAttn" in kind:
                yield from _transformer(
                    f"{place}.attentions.{layer}", f"{original}.1", width, context, depth[index], linear, index
                )
            skips.append(width)
            position += 1
        if index < blocks - 1:
            yield Layer(
                f"down_blocks.{index}.downsamplers.0.conv", f"input_blocks.{position}.0.op", "conv", width, width, 3,
                level=index + 1,
            )  # fmt: skip
            skips.append(width)
            position += 1

    last = blocks - 1
    yield from _residual("mid_block.resnets.0", "middle_block.0", width, width, embedding, last)
    yield from _transformer("mid_block.attentions.0", "middle_block.1", width, context, depth[-1], linear, last)
    yield from _residual("mid_block.resnets.1", "middle_block.2", width, width, embedding, last)

    position = 0
    for index, kind in enumerate(config["up_block_types"]):
        level = last - index
        for layer in range(residuals[level] + 1):
            place, original = f"up_blocks.{index}", f"output_blocks.{position}"
            outputs = channels[level]
            yield from _residual(
                f"{place}.resnets.{layer}", f"{original}.0", width + skips.pop(), outputs, embedding, level
            )
            width = outputs
            attends = "CrossAttn" in kind
            if attends:
                yield from _transformer(
                    f"{place}.attentions.{layer}", f"{original}.1", width, context, depth[level], linear, level
                )
            if layer == residuals[level] and index < blocks - 1:
                yield Layer(
                    f"{place}.upsamplers.0.conv", f"{original}.{2 if attends else 1}.conv", "conv", width, width, 3,
                    level=level - 1,
                )  # fmt: skip
            position += 1
    yield Layer("conv_norm_out", "out.0", "norm", width, width)
    yield Layer("conv_out", "out.2", "conv", width, config["out_channels"], 3)


def _residual(name: str, original: str, inputs: int, outputs: int, embedding: int, level: int) -> Iterator[Layer]:
    yield Layer(f"{name}.norm1", f"{original}.in_layers.0", "norm", inputs, inputs, level=level)
    yield Layer(f"{name}.conv1", f"{original}.in_layers.2", "conv", inputs, outputs, 3, level=level)
    yield Layer(f"{name}.time_emb_proj", f"{original}.emb_layers.1", "linear", embedding, outputs, level=level)
    yield Layer(f"{name}.norm2", f"{original}.out_layers.0", "norm", outputs, outputs, level=level)
    yield Layer(f"{name}.conv2", f"{original}.out_layers.3", "conv", outputs, outputs, 3, level=level)
    if inputs != outputs:
        yield Layer(f"{name}.conv_shortcut", f"{original}.skip_connection", "conv", inputs, outputs, level=level)


def _transformer(
    name: str, original: str, width: int, context: int, depth: int, linear: bool, level: int
) -> Iterator[Layer]:
    kind: Literal["linear", "conv"] = "linear" if linear else "conv"
    yield Layer(f"{name}.norm", f"{original}.norm", "norm", width, width, level=level)
    yield Layer(f"{name}.proj_in", f"{original}.proj_in", kind, width, width, level=level)
    for index in range(depth):
        block, old = f"{name}.transformer_blocks.{index}", f"{original}.transformer_blocks.{index}"
        for norm in ("norm1", "norm2", "norm3"):
            yield Layer(f"{block}.{norm}", f"{old}.{norm}", "norm", width, width, level=level)
        for attention, source in (("attn1", width), ("attn2", context)):
            for part, inputs in (("to_q", width), ("to_k", source), ("to_v", source)):
                yield Layer(
                    f"{block}.{attention}.{part}",
                    f"{old}.{attention}.{part}",
                    "linear",
                    inputs,
                    width,
                    bias=False,
                    level=level,
                )
            yield Layer(
                f"{block}.{attention}.to_out.0", f"{old}.{attention}.to_out.0", "linear", width, width, level=level
            )
        yield Layer(f"{block}.ff.net.0.proj", f"{old}.ff.net.0.proj", "linear", width, width * 8, level=level)
        yield Layer(f"{block}.ff.net.2", f"{old}.ff.net.2", "linear", width * 4, width, level=level)
    yield Layer(f"{name}.proj_out", f"{original}.proj_out", kind, width, width, level=level)
