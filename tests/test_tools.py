"""The classifier that judges the micro model is itself judged on drawn pictures and on random blobs."""

from __future__ import annotations

import math
import random

from PIL import Image, ImageDraw

from tools.check_samples import PROMPTS
from tools.classify_shapes import classify
from tools.draw_shapes import BASE_SHAPES, COLOURS, GROUNDS, SHAPES, SIZE, SUPERSAMPLING, drawn_at_random


def test_drawn_pictures_are_recognised() -> None:
    rng = random.Random(1)
    kinds = [(shape, colour, ground) for shape in SHAPES for colour in COLOURS for ground in GROUNDS] * 10
    right = 0
    for shape, colour, ground in kinds:
        verdict = classify(drawn_at_random(shape, colour, ground, rng))
        right += (verdict.shape, verdict.colour, verdict.ground) == (shape, colour, ground)
    assert right / len(kinds) >= 0.99


def test_an_empty_picture_and_noise_are_nothing() -> None:
    rng = random.Random(2)
    assert classify(Image.new("RGB", (32, 32), (250, 250, 250))).shape == "none"
    noise = Image.new("RGB", (32, 32))
    noise.putdata([(rng.randrange(256), rng.randrange(256), rng.randrange(256)) for _ in range(1024)])
    assert classify(noise).shape == "none"


def test_random_blobs_are_no_stars() -> None:
    rng = random.Random(5)
    names = [classify(_blob(rng)).shape for _ in range(200)]
    assert names.count("star") == 0
    assert names.count("heart") / len(names) < 0.15


def _blob(rng: random.Random) -> Image.Image:
    waves = [(k, rng.gauss(0, 0.35) / k, rng.uniform(0, 2 * math.pi)) for k in range(2, 7)]
    corners = []
    for index in range(96):
        angle = 2 * math.pi * index / 96
        radius = 9 * (1 + sum(height * math.cos(k * angle + phase) for k, height, phase in waves))
        radius = max(2.0, min(13.0, radius))
        corners.append(
            ((16 + radius * math.cos(angle)) * SUPERSAMPLING, (16 + radius * math.sin(angle)) * SUPERSAMPLING)
        )
    canvas = Image.new("RGB", (SIZE * SUPERSAMPLING, SIZE * SUPERSAMPLING), (250, 250, 250))
    ImageDraw.Draw(canvas).polygon(corners, fill=COLOURS["red"])
    return canvas.resize((SIZE, SIZE), Image.Resampling.BOX)


def test_the_list_of_prompts_is_what_the_model_card_says() -> None:
    lines = [line for line in PROMPTS.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == 248
    assert sum(any(f" {shape} " in line for shape in BASE_SHAPES) for line in lines) == 200
    assert sum(" heart " in line for line in lines) == 48
