"""The layers of AutoencoderKLHunyuanVideo, the causal 3D autoencoder, from its configuration; torch-free.

Its original files use the same names. Published configurations of the original name their blocks otherwise
("DownEncoderBlockCausal3D"); only the widths matter here.
"""

from __future__ import annotations

from collections.abc import Iterator

from runner.model.layers import Config, Layer


def video_vae_layers(config: Config) -> list[Layer]:
    """The layers of an AutoencoderKLHunyuanVideo; `level` counts the halvings of the picture's sides."""
    return [*_encoder(config), *_decoder(config), *_quantizers(config)]


def frames_at(layer: Layer, frames: int) -> int:
    """Frames that a layer sees: halved at the second and third halving of the sides."""
    return -(-frames // 2 ** max(0, min(2, layer.level - 1)))


def _conv(name: str, inputs: int, outputs: int, kernel: int = 3, level: int = 0) -> Layer:
    return Layer(
        name=f"{name}.conv",
        original=f"{name}.conv",
        kind="conv",
        inputs=inputs,
        outputs=outputs,
        kernel=kernel,
        level=level,
        depth=kernel,
    )


def _quantizers(config: Config) -> Iterator[Layer]:
    latent = config["latent_channels"]
    level = len(config["block_out_channels"]) - 1
    for name, channels in (("quant_conv", 2 * latent), ("post_quant_conv", latent)):
        yield Layer(
            name=name, original=name, kind="conv", inputs=channels, outputs=channels, kernel=1, level=level, depth=1
        )


def _encoder(config: Config) -> Iterator[Layer]:
    channels: list[int] = list(config["block_out_channels"])
    width = channels[0]
    yield _conv("encoder.conv_in", config["in_channels"], width)
    for index, outputs in enumerate(channels):
        for layer in range(config["layers_per_block"]):
            yield from _residual(f"encoder.down_blocks.{index}.resnets.{layer}", width, outputs, index)
            width = outputs
        if index < len(channels) - 1:
            yield _conv(f"encoder.down_blocks.{index}.downsamplers.0.conv", width, width, level=index + 1)
    level = len(channels) - 1
    yield from _middle("encoder", config, width, level)
    yield Layer(
        name="encoder.conv_norm_out",
        original="encoder.conv_norm_out",
        kind="norm",
        inputs=width,
        outputs=width,
        level=level,
    )
    yield _conv("encoder.conv_out", width, 2 * config["latent_channels"], level=level)


def _decoder(config: Config) -> Iterator[Layer]:
    channels: list[int] = list(reversed(config["block_out_channels"]))
    level, width = len(channels) - 1, channels[0]
    yield _conv("decoder.conv_in", config["latent_channels"], width, level=level)
    yield from _middle("decoder", config, width, level)
    for index, outputs in enumerate(channels):
        for layer in range(config["layers_per_block"] + 1):
            yield from _residual(f"decoder.up_blocks.{index}.resnets.{layer}", width, outputs, level - index)
            width = outputs
        if index < level:
            yield _conv(f"decoder.up_blocks.{index}.upsamplers.0.conv", width, width, level=level - index - 1)
    yield Layer(
        name="decoder.conv_norm_out", original="decoder.conv_norm_out", kind="norm", inputs=width, outputs=width
    )
    yield _conv("decoder.conv_out", width, config["out_channels"])


def _middle(half: str, config: Config, width: int, level: int) -> Iterator[Layer]:
    yield from _residual(f"{half}.mid_block.resnets.0", width, width, level)
    if config.get("mid_block_add_attention", True):
        name = f"{half}.mid_block.attentions.0"
        yield Layer(
            name=f"{name}.group_norm",
            original=f"{name}.group_norm",
            kind="norm",
            inputs=width,
            outputs=width,
            level=level,
        )
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            yield Layer(
                name=f"{name}.{part}",
                original=f"{name}.{part}",
                kind="linear",
                inputs=width,
                outputs=width,
                level=level,
            )
    yield from _residual(f"{half}.mid_block.resnets.1", width, width, level)


def _residual(name: str, inputs: int, outputs: int, level: int) -> Iterator[Layer]:
    yield Layer(name=f"{name}.norm1", original=f"{name}.norm1", kind="norm", inputs=inputs, outputs=inputs, level=level)
    yield _conv(f"{name}.conv1", inputs, outputs, level=level)
    yield Layer(
        name=f"{name}.norm2", original=f"{name}.norm2", kind="norm", inputs=outputs, outputs=outputs, level=level
    )
    yield _conv(f"{name}.conv2", outputs, outputs, level=level)
    if inputs != outputs:
        yield _conv(f"{name}.conv_shortcut", inputs, outputs, 1, level=level)
