"""The layers of FramePack's transformer (arXiv 2504.12626): HunyuanVideo's, with embedders of the history and of an image.

Its files use diffusers' names. Torch-free.
"""

from __future__ import annotations

from dataclasses import replace

from runner.families.hunyuan_video.architecture import hunyuan_layers, width_of
from runner.model.layers import Config, Layer

HISTORY = (("proj", 1), ("proj_2x", 2), ("proj_4x", 4))
"""Embedders of the clean frames and how coarse they are: kernel and stride are (scale, 2 scale, 2 scale)."""


def framepack_layers(config: Config) -> list[Layer]:
    """The layers of a HunyuanVideoFramepackTransformer3DModel."""
    width, image, channels = width_of(config), config["image_proj_dim"], config["in_channels"]
    extra = [
        Layer(
            name=f"clean_x_embedder.{name}",
            original="",
            kind="conv",
            inputs=channels,
            outputs=width,
            kernel=2 * scale,
            depth=scale,
        )
        for name, scale in HISTORY
    ]
    extra += [
        Layer(name="image_projection.up", original="", kind="linear", inputs=image, outputs=3 * width),
        Layer(name="image_projection.down", original="", kind="linear", inputs=3 * width, outputs=width),
    ]
    layers = [*extra, *hunyuan_layers(config)]
    return [replace(layer, original=layer.name, part=(0, 1), span=1, swapped=False) for layer in layers]
