"""The layers of the U-Net, the autoencoder and the CLIP text encoder as data, from their configurations; torch-free.

One description serves planning (exact parameter counts, LoRA targets, memory), the strict check of checkpoint headers
and the renaming between the diffusers and the original (LDM) layout. Tests compare it with diffusers' own classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

Shape = tuple[int, ...]
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Layer:
    """A layer with weights. `name` is its diffusers name, `original` its LDM name.

    `level` counts the halvings of the resolution above it; `tokens` marks layers on flattened positions or text.
    """

    name: str
    original: str
    kind: Literal["conv", "linear", "norm", "embedding"]
    inputs: int
    outputs: int
    kernel: int = 1
    bias: bool = True
    level: int = 0
    original_is_conv: bool = False
    """An attention projection that is a linear layer in diffusers and a 1x1 convolution in the LDM layout."""

    def parameters(self) -> Iterator[tuple[str, Shape]]:
        """(name below the layer, shape) of each parameter, in diffusers' layout."""
        if self.kind == "conv":
            yield "weight", (self.outputs, self.inputs, self.kernel, self.kernel)
        elif self.kind == "norm":
            yield "weight", (self.outputs,)
        else:
            yield "weight", (self.outputs, self.inputs)
        if self.bias and self.kind != "embedding":
            yield "bias", (self.outputs,)

    def original_shape(self, name: str, shape: Shape) -> Shape:
        return (*shape, 1, 1) if self.original_is_conv and name == "weight" else shape


def parameters(layers: Sequence[Layer]) -> dict[str, Shape]:
    """diffusers key → shape."""
    return {f"{layer.name}.{name}": shape for layer in layers for name, shape in layer.parameters()}


def original_parameters(layers: Sequence[Layer], prefix: str) -> dict[str, Shape]:
    """Key in the original layout → shape there."""
    return {
        f"{prefix}{layer.original}.{name}": layer.original_shape(name, shape)
        for layer in layers
        for name, shape in layer.parameters()
    }


def renames(layers: Sequence[Layer], prefix: str) -> dict[str, str]:
    """Key in the original layout → diffusers key."""
    return {
        f"{prefix}{layer.original}.{name}": f"{layer.name}.{name}" for layer in layers for name, _ in layer.parameters()
    }


def count(layers: Sequence[Layer]) -> int:
    """Number of parameters."""
    return sum(prod(shape) for shape in parameters(layers).values())


def _per_block(value: Any, blocks: int) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * blocks


# --- U-Net ------------------------------------------------------------------------------------------------------------


def unet_layers(config: Config) -> list[Layer]:
    """The layers of a UNet2DConditionModel, in the order of the forward pass."""
    return list(_unet(config))


def _unet(config: Config) -> Iterator[Layer]:
    channels: list[int] = list(config["block_out_channels"])
    blocks = len(channels)
    per_block = _per_block(config.get("layers_per_block", 2), blocks)
    context = config["cross_attention_dim"]
    depth = _per_block(config.get("transformer_layers_per_block", 1), blocks)
    linear = bool(config.get("use_linear_projection", False))
    embedding = channels[0] * 4
    yield Layer("conv_in", "input_blocks.0.0", "conv", config["in_channels"], channels[0], 3)
    yield Layer("time_embedding.linear_1", "time_embed.0", "linear", channels[0], embedding)
    yield Layer("time_embedding.linear_2", "time_embed.2", "linear", embedding, embedding)

    skips = [channels[0]]
    position, width = 1, channels[0]
    for index, kind in enumerate(config["down_block_types"]):
        for layer in range(per_block[index]):
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
        for layer in range(per_block[level] + 1):
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
            if layer == per_block[level] and index < blocks - 1:
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


# --- autoencoder ------------------------------------------------------------------------------------------------------


def vae_layers(config: Config) -> list[Layer]:
    """The layers of an AutoencoderKL."""
    return [*_encoder(config), *_decoder(config), *_quantizers(config)]


def _quantizers(config: Config) -> Iterator[Layer]:
    latent = config["latent_channels"]
    if config.get("use_quant_conv", True):
        yield Layer("quant_conv", "quant_conv", "conv", 2 * latent, 2 * latent)
    if config.get("use_post_quant_conv", True):
        yield Layer("post_quant_conv", "post_quant_conv", "conv", latent, latent)


def _encoder(config: Config) -> Iterator[Layer]:
    channels: list[int] = list(config["block_out_channels"])
    width = channels[0]
    yield Layer("encoder.conv_in", "encoder.conv_in", "conv", config["in_channels"], width, 3)
    for index, outputs in enumerate(channels):
        for layer in range(config["layers_per_block"]):
            yield from _vae_residual(
                f"encoder.down_blocks.{index}.resnets.{layer}",
                f"encoder.down.{index}.block.{layer}",
                width,
                outputs,
                index,
            )
            width = outputs
        if index < len(channels) - 1:
            yield Layer(
                f"encoder.down_blocks.{index}.downsamplers.0.conv", f"encoder.down.{index}.downsample.conv", "conv",
                width, width, 3, level=index + 1,
            )  # fmt: skip
    level = len(channels) - 1
    yield from _vae_middle("encoder", width, level)
    yield Layer("encoder.conv_norm_out", "encoder.norm_out", "norm", width, width, level=level)
    yield Layer("encoder.conv_out", "encoder.conv_out", "conv", width, 2 * config["latent_channels"], 3, level=level)


def _decoder(config: Config) -> Iterator[Layer]:
    channels: list[int] = list(reversed(config["block_out_channels"]))
    level = len(channels) - 1
    width = channels[0]
    yield Layer("decoder.conv_in", "decoder.conv_in", "conv", config["latent_channels"], width, 3, level=level)
    yield from _vae_middle("decoder", width, level)
    for index, outputs in enumerate(channels):
        place, original = f"decoder.up_blocks.{index}", f"decoder.up.{level - index}"
        for layer in range(config["layers_per_block"] + 1):
            yield from _vae_residual(
                f"{place}.resnets.{layer}", f"{original}.block.{layer}", width, outputs, level - index
            )
            width = outputs
        if index < level:
            yield Layer(
                f"{place}.upsamplers.0.conv",
                f"{original}.upsample.conv",
                "conv",
                width,
                width,
                3,
                level=level - index - 1,
            )
    yield Layer("decoder.conv_norm_out", "decoder.norm_out", "norm", width, width)
    yield Layer("decoder.conv_out", "decoder.conv_out", "conv", width, config["out_channels"], 3)


def _vae_middle(half: str, width: int, level: int) -> Iterator[Layer]:
    yield from _vae_residual(f"{half}.mid_block.resnets.0", f"{half}.mid.block_1", width, width, level)
    attention, original = f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1"
    yield Layer(f"{attention}.group_norm", f"{original}.norm", "norm", width, width, level=level)
    for part, old in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        yield Layer(
            f"{attention}.{part}", f"{original}.{old}", "linear", width, width, level=level, original_is_conv=True
        )
    yield from _vae_residual(f"{half}.mid_block.resnets.1", f"{half}.mid.block_2", width, width, level)


def _vae_residual(name: str, original: str, inputs: int, outputs: int, level: int) -> Iterator[Layer]:
    yield Layer(f"{name}.norm1", f"{original}.norm1", "norm", inputs, inputs, level=level)
    yield Layer(f"{name}.conv1", f"{original}.conv1", "conv", inputs, outputs, 3, level=level)
    yield Layer(f"{name}.norm2", f"{original}.norm2", "norm", outputs, outputs, level=level)
    yield Layer(f"{name}.conv2", f"{original}.conv2", "conv", outputs, outputs, 3, level=level)
    if inputs != outputs:
        yield Layer(f"{name}.conv_shortcut", f"{original}.nin_shortcut", "conv", inputs, outputs, level=level)


# --- text encoder -----------------------------------------------------------------------------------------------------


def clip_layers(config: Config) -> list[Layer]:
    """The layers of a CLIPTextModel; the original names are those of transformers 4, which files use."""
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
    return Layer(name, f"text_model.{name}", kind, inputs, outputs)
