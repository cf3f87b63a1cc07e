"""strip.png: one row a prompt, one column a checkpoint; the label of a picture comes from its own step."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from runner.pictures import read_picture

GAP = 6
SMALLEST = 96
LARGEST = 256
BAND = "white"
INK = "#1f2328"
CHOSEN = "#1a7f37"


@dataclass(frozen=True)
class Column:
    """A checkpoint; `pictures` is prompt index → file, with a gap where one is missing; `videos` prompt index → the name
    of its video beside the report."""

    label: str
    pictures: dict[int, Path]
    chosen: bool = False
    videos: dict[int, str] = field(default_factory=dict)


def cell_size(width: int, height: int) -> tuple[int, int]:
    """Small pictures are enlarged by a whole factor, large ones reduced, so that a strip can be read."""
    longest = max(width, height)
    if longest < SMALLEST:
        factor = -(-SMALLEST // longest)
        return width * factor, height * factor
    if longest > LARGEST:
        return max(1, width * LARGEST // longest), max(1, height * LARGEST // longest)
    return width, height


def draw_strip(prompts: Sequence[str], sizes: Sequence[tuple[int, int]], columns: Sequence[Column]) -> Image.Image:
    """`sizes` are the prompts' picture sizes; a missing picture leaves a labelled gap."""
    font = ImageFont.load_default(13)
    cells = [cell_size(*size) for size in sizes]
    cell_width = max((width for width, _ in cells), default=SMALLEST)
    margin = 150
    band = 22
    width = margin + len(columns) * (cell_width + GAP) + GAP
    height = band + GAP + sum(cell_height + GAP for _, cell_height in cells)
    strip = Image.new("RGB", (width, height), BAND)
    pen = ImageDraw.Draw(strip)
    for number, column in enumerate(columns):
        x = margin + number * (cell_width + GAP)
        pen.text(
            (x + cell_width / 2, band / 2 + 2),
            column.label,
            fill=CHOSEN if column.chosen else INK,
            font=font,
            anchor="mm",
        )
    y = band + GAP
    for row, (prompt, (this_width, cell_height)) in enumerate(zip(prompts, cells, strict=True)):
        lines = textwrap.wrap(prompt, 21)[: max(1, cell_height // 16)]
        pen.multiline_text((GAP, y + cell_height / 2), "\n".join(lines), fill=INK, font=font, anchor="lm")
        for number, column in enumerate(columns):
            x = margin + number * (cell_width + GAP)
            _cell(strip, pen, column, row, (x, y, this_width, cell_height), font)
        y += cell_height + GAP
    return strip


def _cell(
    strip: Image.Image,
    pen: ImageDraw.ImageDraw,
    column: Column,
    row: int,
    box: tuple[int, int, int, int],
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
) -> None:
    x, y, width, height = box
    file = column.pictures.get(row)
    if file is None or not file.is_file():
        pen.rectangle((x, y, x + width - 1, y + height - 1), outline="#d0d7de")
        pen.text((x + width / 2, y + height / 2), "missing", fill="#8c959f", font=font, anchor="mm")
    else:
        with read_picture(file) as picture:
            enlarged = picture.width < width
            method = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
            strip.paste(picture.convert("RGB").resize((width, height), method), (x, y))
    if column.chosen:
        pen.rectangle((x - 2, y - 2, x + width + 1, y + height + 1), outline=CHOSEN, width=2)
