"""Stand-ins for full-size checkpoints: the real keys and shapes, and no bytes on the disk (a sparse file of zeros).

python -m tests.stand_in sdxl FILE.safetensors [--without t5xxl]
"""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path

import click

DATA = Path(__file__).resolve().parent / "data"
KEY_LISTS = {"sd15": "checkpoint_sd15_keys", "sdxl": "checkpoint_sdxl_keys", "sd3": "checkpoint_sd3_medium_keys"}


def write_stand_in(
    path: Path, family: str, without: tuple[str, ...] = (), extra: dict[str, list[int]] | None = None
) -> Path:
    """A safetensors file in fp16 of exactly the family's keys, less those that contain one of `without`."""
    shapes: dict[str, list[int]] = json.loads((DATA / f"{KEY_LISTS[family]}.json").read_text())
    shapes = {key: shape for key, shape in shapes.items() if not any(part in key for part in without)} | (extra or {})
    header: dict[str, object] = {}
    offset = 0
    for key, shape in shapes.items():
        size = 2 * prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        stream.truncate(8 + len(encoded) + offset)
    return path


@click.command(help=__doc__)
@click.argument("family", type=click.Choice(list(KEY_LISTS)))
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--without", multiple=True)
def main(family: str, path: Path, without: tuple[str, ...]) -> None:
    write_stand_in(path, family, without)


if __name__ == "__main__":
    main()
