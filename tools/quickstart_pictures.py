"""Draws the quickstart's pictures: hearts, which the micro model has never seen, and some of the shapes that it knows.

python -m tools.quickstart_pictures      → recipes/quickstart/images
"""

from __future__ import annotations

import random
from pathlib import Path

from tools.draw_shapes import BASE_SHAPES, COLOURS, GROUNDS, caption, drawn_at_random

FOLDER = Path(__file__).resolve().parent.parent / "recipes" / "quickstart" / "images"
HEARTS_EACH, SHAPES_EACH = 4, 6
"""Pictures of each colour on each ground."""


def main() -> None:
    rng = random.Random(77)
    kinds = [("10_heart", "heart", HEARTS_EACH)] + [("1_shapes", shape, SHAPES_EACH) for shape in BASE_SHAPES]
    for name, shape, each in kinds:
        folder = FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        for colour in COLOURS:
            for ground in GROUNDS:
                for number in range(each):
                    stem = f"{shape}-{colour}-{ground}-{number + 1}"
                    drawn_at_random(shape, colour, ground, rng).save(folder / f"{stem}.png", optimize=True)
                    (folder / f"{stem}.txt").write_text(caption(shape, colour, ground) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
