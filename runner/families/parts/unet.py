"""The layers of the U-Net of Stable Diffusion 1.5 and XL, from its configuration; torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from runner.model.layers import Config, Layer, per_block


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
    yield Layer(
        name="conv_in",
        original="input_blocks.0.0",
        kind="conv",
        inputs=config["in_channels"],
        outputs=channels[0],
        kernel=3,
    )
    yield Layer(
        name="time_embedding.linear_1", original="time_embed.0", kind="linear", inputs=channels[0], outputs=embedding
    )
    yield Layer(
        name="time_embedding.linear_2", original="time_embed.2", kind="linear", inputs=embedding, outputs=embedding
    )
    if config.get("addition_embed_type") == "text_time":
        added = config["projection_class_embeddings_input_dim"]
        yield Layer(
            name="add_embedding.linear_1", original="label_emb.0.0", kind="linear", inputs=added, outputs=embedding
        )
        yield Layer(
            name="add_embedding.linear_2", original="label_emb.0.2", kind="linear", inputs=embedding, outputs=embedding
        )

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
                name=f"down_blocks.{index}.downsamplers.0.conv",
                original=f"input_blocks.{position}.0.op",
                kind="conv",
                inputs=width,
                outputs=width,
                kernel=3,
                level=index + 1,
            )
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
                    name=f"{place}.upsamplers.0.conv",
                    original=f"{original}.{2 if attends else 1}.conv",
                    kind="conv",
                    inputs=width,
                    outputs=width,
                    kernel=3,
                    level=level - 1,
                )
            position += 1
    yield Layer(name="conv_norm_out", original="out.0", kind="norm", inputs=width, outputs=width)
    yield Layer(name="conv_out", original="out.2", kind="conv", inputs=width, outputs=config["out_channels"], kernel=3)


def _residual(name: str, original: str, inputs: int, outputs: int, embedding: int, level: int) -> Iterator[Layer]:
    yield Layer(
        name=f"{name}.norm1",
        original=f"{original}.in_layers.0",
        kind="norm",
        inputs=inputs,
        outputs=inputs,
        level=level,
    )
    yield Layer(
        name=f"{name}.conv1",
        original=f"{original}.in_layers.2",
        kind="conv",
        inputs=inputs,
        outputs=outputs,
        kernel=3,
        level=level,
    )
    yield Layer(
        name=f"{name}.time_emb_proj",
        original=f"{original}.emb_layers.1",
        kind="linear",
        inputs=embedding,
        outputs=outputs,
        level=level,
    )
    yield Layer(
        name=f"{name}.norm2",
        original=f"{original}.out_layers.0",
        kind="norm",
        inputs=outputs,
        outputs=outputs,
        level=level,
    )
    yield Layer(
        name=f"{name}.conv2",
        original=f"{original}.out_layers.3",
        kind="conv",
        inputs=outputs,
        outputs=outputs,
        kernel=3,
        level=level,
    )
    if inputs != outputs:
        yield Layer(
            name=f"{name}.conv_shortcut",
            original=f"{original}.skip_connection",
            kind="conv",
            inputs=inputs,
            outputs=outputs,
            level=level,
        )


def _transformer(
    name: str, original: str, width: int, context: int, depth: int, linear: bool, level: int
) -> Iterator[Layer]:
    kind: Literal["linear", "conv"] = "linear" if linear else "conv"
    yield Layer(name=f"{name}.norm", original=f"{original}.norm", kind="norm", inputs=width, outputs=width, level=level)
    yield Layer(
        name=f"{name}.proj_in", original=f"{original}.proj_in", kind=kind, inputs=width, outputs=width, level=level
    )
    for index in range(depth):
        block, old = f"{name}.transformer_blocks.{index}", f"{original}.transformer_blocks.{index}"
        for norm in ("norm1", "norm2", "norm3"):
            yield Layer(
                name=f"{block}.{norm}", original=f"{old}.{norm}", kind="norm", inputs=width, outputs=width, level=level
            )
        for attention, source in (("attn1", width), ("attn2", context)):
            for part, inputs in (("to_q", width), ("to_k", source), ("to_v", source)):
                yield Layer(
                    name=f"{block}.{attention}.{part}",
                    original=f"{old}.{attention}.{part}",
                    kind="linear",
                    inputs=inputs,
                    outputs=width,
                    bias=False,
                    level=level,
                )
            yield Layer(
                name=f"{block}.{attention}.to_out.0",
                original=f"{old}.{attention}.to_out.0",
                kind="linear",
                inputs=width,
                outputs=width,
                level=level,
            )
        yield Layer(
            name=f"{block}.ff.net.0.proj",
            original=f"{old}.ff.net.0.proj",
            kind="linear",
            inputs=width,
            outputs=width * 8,
            level=level,
        )
        yield Layer(
            name=f"{block}.ff.net.2",
            original=f"{old}.ff.net.2",
            kind="linear",
            inputs=width * 4,
            outputs=width,
            level=level,
        )
    yield Layer(
        name=f"{name}.proj_out", original=f"{original}.proj_out", kind=kind, inputs=width, outputs=width, level=level
    )
