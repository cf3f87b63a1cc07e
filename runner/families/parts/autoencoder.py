"""The layers of AutoencoderKL, from its configuration; torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from runner.families.parts.layers import Config, Layer


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
