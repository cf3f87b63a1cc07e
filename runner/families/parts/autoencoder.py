"""The layers of AutoencoderKL, from its configuration; torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from runner.model.layers import Config, Layer


def vae_layers(config: Config) -> list[Layer]:
    """The layers of an AutoencoderKL."""
    return [*_encoder(config), *_decoder(config), *_quantizers(config)]


def _quantizers(config: Config) -> Iterator[Layer]:
    latent = config["latent_channels"]
    if config.get("use_quant_conv", True):
        yield Layer(name="quant_conv", original="quant_conv", kind="conv", inputs=2 * latent, outputs=2 * latent)
    if config.get("use_post_quant_conv", True):
        yield Layer(name="post_quant_conv", original="post_quant_conv", kind="conv", inputs=latent, outputs=latent)


def _encoder(config: Config) -> Iterator[Layer]:
    channels: list[int] = list(config["block_out_channels"])
    width = channels[0]
    yield Layer(
        name="encoder.conv_in",
        original="encoder.conv_in",
        kind="conv",
        inputs=config["in_channels"],
        outputs=width,
        kernel=3,
    )
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
                name=f"encoder.down_blocks.{index}.downsamplers.0.conv",
                original=f"encoder.down.{index}.downsample.conv",
                kind="conv",
                inputs=width,
                outputs=width,
                kernel=3,
                level=index + 1,
            )
    level = len(channels) - 1
    yield from _vae_middle("encoder", width, level)
    yield Layer(
        name="encoder.conv_norm_out", original="encoder.norm_out", kind="norm", inputs=width, outputs=width, level=level
    )
    yield Layer(
        name="encoder.conv_out",
        original="encoder.conv_out",
        kind="conv",
        inputs=width,
        outputs=2 * config["latent_channels"],
        kernel=3,
        level=level,
    )


def _decoder(config: Config) -> Iterator[Layer]:
    channels: list[int] = list(reversed(config["block_out_channels"]))
    level = len(channels) - 1
    width = channels[0]
    yield Layer(
        name="decoder.conv_in",
        original="decoder.conv_in",
        kind="conv",
        inputs=config["latent_channels"],
        outputs=width,
        kernel=3,
        level=level,
    )
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
                name=f"{place}.upsamplers.0.conv",
                original=f"{original}.upsample.conv",
                kind="conv",
                inputs=width,
                outputs=width,
                kernel=3,
                level=level - index - 1,
            )
    yield Layer(name="decoder.conv_norm_out", original="decoder.norm_out", kind="norm", inputs=width, outputs=width)
    yield Layer(
        name="decoder.conv_out",
        original="decoder.conv_out",
        kind="conv",
        inputs=width,
        outputs=config["out_channels"],
        kernel=3,
    )


def _vae_middle(half: str, width: int, level: int) -> Iterator[Layer]:
    yield from _vae_residual(f"{half}.mid_block.resnets.0", f"{half}.mid.block_1", width, width, level)
    attention, original = f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1"
    yield Layer(
        name=f"{attention}.group_norm",
        original=f"{original}.norm",
        kind="norm",
        inputs=width,
        outputs=width,
        level=level,
    )
    for part, old in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        yield Layer(
            name=f"{attention}.{part}",
            original=f"{original}.{old}",
            kind="linear",
            inputs=width,
            outputs=width,
            level=level,
            original_is_conv=True,
        )
    yield from _vae_residual(f"{half}.mid_block.resnets.1", f"{half}.mid.block_2", width, width, level)


def _vae_residual(name: str, original: str, inputs: int, outputs: int, level: int) -> Iterator[Layer]:
    yield Layer(
        name=f"{name}.norm1", original=f"{original}.norm1", kind="norm", inputs=inputs, outputs=inputs, level=level
    )
    yield Layer(
        name=f"{name}.conv1",
        original=f"{original}.conv1",
        kind="conv",
        inputs=inputs,
        outputs=outputs,
        kernel=3,
        level=level,
    )
    yield Layer(
        name=f"{name}.norm2", original=f"{original}.norm2", kind="norm", inputs=outputs, outputs=outputs, level=level
    )
    yield Layer(
        name=f"{name}.conv2",
        original=f"{original}.conv2",
        kind="conv",
        inputs=outputs,
        outputs=outputs,
        kernel=3,
        level=level,
    )
    if inputs != outputs:
        yield Layer(
            name=f"{name}.conv_shortcut",
            original=f"{original}.nin_shortcut",
            kind="conv",
            inputs=inputs,
            outputs=outputs,
            level=level,
        )
