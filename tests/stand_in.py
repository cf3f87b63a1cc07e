"""Stand-ins for full-size checkpoints: the real keys and shapes, and no bytes on the disk (a sparse file of zeros).

python -m tests.stand_in sdxl FILE.safetensors [--without t5xxl]
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import click

DATA = Path(__file__).resolve().parent / "data"
KEY_LISTS = {"sd15": "checkpoint_sd15_keys", "sdxl": "checkpoint_sdxl_keys", "sd3": "checkpoint_sd3_medium_keys"}


def write_stand_in(
    path: Path, family: str, without: tuple[str, ...] = (), extra: dict[str, list[int]] | None = None
) -> Path:
    """A safetensors file in fp16 of exactly the family's keys, less those that contain one of `without`."""
    shapes: dict[str, list[int]] = json.loads((DATA / f"{KEY_LISTS[family]}.json").read_text())
    shapes = {key: shape for key, shape in shapes.items() if not any(part in key for part in without)} | (extra or {})
    return write_shapes(path, shapes)


def write_shapes(path: Path, shapes: Mapping[str, Sequence[int]]) -> Path:
    """A safetensors file in fp16 of these keys, all zeros."""
    header: dict[str, object] = {}
    offset = 0
    for key, shape in shapes.items():
        size = 2 * prod(shape)
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        stream.truncate(8 + len(encoded) + offset)
    return path


def write_video(folder: Path, family: str) -> None:
    """The files of a video model under the names that the recipes use, and a tokenizer folder."""
    from runner.families.hunyuan_video.tiny import write_llama_tokenizer
    from runner.families.parts.clip import clip_layers
    from runner.families.parts.files import CONFIGS
    from runner.families.parts.llama import llama_layers, siglip_layers
    from runner.model.layers import parameters

    def shapes(part: str, layers: Callable[[Any], list[Any]], prefix: str) -> dict[str, tuple[int, ...]]:
        config = json.loads((CONFIGS / "framepack" / part / "config.json").read_text())
        return {prefix + key: shape for key, shape in parameters(layers(config)).items()}

    def listed(name: str) -> dict[str, list[int]]:
        found: dict[str, list[int]] = json.loads((DATA / f"{name}.json").read_text())["keys"]
        return found

    if family == "hunyuan_video":
        write_shapes(folder / "hunyuan.safetensors", listed("hunyuan_dit_keys"))
    else:
        keys = listed("framepack_dit_keys")
        write_shapes(folder / "FramePackI2V_HY_bf16.safetensors", keys)
        names = sorted(keys)
        for number in range(3):
            own = {name: keys[name] for name in names[number::3]}
            write_shapes(folder / f"diffusion_pytorch_model-{number + 1:05d}-of-00003.safetensors", own)
    write_shapes(folder / "hunyuan-video-vae.safetensors", listed("hunyuan_vae_keys"))
    write_shapes(folder / "llava_llama3_fp16.safetensors", shapes("text_encoder", llama_layers, "model."))
    write_shapes(folder / "clip_l.safetensors", shapes("text_encoder_2", clip_layers, "text_model."))
    write_shapes(
        folder / "sigclip_vision_patch14_384.safetensors", shapes("image_encoder", siglip_layers, "vision_model.")
    )
    write_llama_tokenizer(folder / "llama-tokenizer", 128_256)


def write_flux(folder: Path) -> None:
    """The files of FLUX.1 and Chroma under the names that people have, and T5's tokenizer."""
    from runner.families.parts.clip import clip_layers, t5_layers
    from runner.families.parts.files import CONFIGS
    from runner.families.parts.tiny import write_t5_tokenizer
    from runner.model.layers import parameters

    for name, keys in (("flux1-dev", "flux1_dev"), ("flux1-kontext-dev", "flux1_dev"), ("Chroma1-HD", "chroma")):
        write_shapes(folder / f"{name}.safetensors", json.loads((DATA / f"{keys}_bfl_keys.json").read_text()))
    write_shapes(folder / "ae.safetensors", json.loads((DATA / "flux_vae_bfl_keys.json").read_text()))
    for part, layers, prefix, file in (
        ("text_encoder", clip_layers, "text_model.", "clip_l"),
        ("text_encoder_2", t5_layers, "", "t5xxl_fp16"),
    ):
        config = json.loads((CONFIGS / "flux1" / part / "config.json").read_text())
        shapes = {prefix + key: shape for key, shape in parameters(layers(config)).items()}
        write_shapes(folder / f"{file}.safetensors", shapes)
    write_t5_tokenizer(folder / "t5-tokenizer", 32_100)


@click.command(help=__doc__)
@click.argument("family", type=click.Choice(list(KEY_LISTS)))
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--without", multiple=True)
def main(family: str, path: Path, without: tuple[str, ...]) -> None:
    write_stand_in(path, family, without)


if __name__ == "__main__":
    main()
