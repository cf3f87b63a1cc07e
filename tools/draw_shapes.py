"""Draws the pictures that the built-in micro model knows: one coloured shape on a plain ground, 32 x 32 pixels.

Shapes are polygons (or an ellipse's polygon) in the unit circle, turned, scaled and moved a little, drawn at eight
times the size and averaged down. Everything is drawn from one `random.Random`, so the same seed gives the same bytes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIZE = 32
SUPERSAMPLING = 8

COLOURS = {
    "red": (218, 36, 40),
    "green": (36, 158, 62),
    "blue": (38, 84, 222),
    "yellow": (242, 214, 38),
    "purple": (148, 48, 192),
    "orange": (244, 128, 28),
}
GROUNDS = {"white": (250, 250, 250), "black": (6, 6, 6)}
BASE_SHAPES = ("circle", "square", "triangle", "star")
SHAPES = (*BASE_SHAPES, "heart")

Point = tuple[float, float]


def outline(shape: str) -> list[Point]:
    """The shape's outline in the unit circle, y pointing down; the areas are made similar."""
    if shape == "circle":
        return [(0.86 * math.cos(a), 0.86 * math.sin(a)) for a in _angles(64)]
    if shape == "square":
        return [(-0.76, -0.76), (0.76, -0.76), (0.76, 0.76), (-0.76, 0.76)]
    if shape == "triangle":
        return [(0.0, -1.0), (0.95, 0.75), (-0.95, 0.75)]
    if shape == "star":
        corners = []
        for index in range(10):
            radius = 1.05 if index % 2 == 0 else 0.44
            angle = -math.pi / 2 + index * math.pi / 5
            corners.append((radius * math.cos(angle), radius * math.sin(angle)))
        return corners
    if shape == "heart":
        points = []
        for angle in _angles(96):
            x = 16 * math.sin(angle) ** 3
            y = 13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle) - math.cos(4 * angle)
            points.append((x / 16.5, -(y + 2.5) / 15.5))
        return points
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def _angles(count: int) -> list[float]:
    return [2 * math.pi * index / count for index in range(count)]


@dataclass(frozen=True)
class Placement:
    """Where and how large a shape is drawn: radius and centre in pixels, turn in degrees."""

    radius: float
    x: float
    y: float
    turn: float

    @classmethod
    def drawn(cls, rng: random.Random) -> Placement:
        """A placement at random that keeps the whole shape in the picture."""
        radius = rng.uniform(8.5, 12.0)
        room = SIZE / 2 - radius * 1.08 - 0.5
        return cls(
            radius, SIZE / 2 + rng.uniform(-room, room), SIZE / 2 + rng.uniform(-room, room), rng.uniform(-12, 12)
        )


def draw(shape: str, colour: Sequence[int], ground: Sequence[int], placement: Placement) -> Image.Image:
    """One picture, RGB, 32 x 32."""
    scale = SUPERSAMPLING
    canvas = Image.new("RGB", (SIZE * scale, SIZE * scale), tuple(ground))
    cosine, sine = math.cos(math.radians(placement.turn)), math.sin(math.radians(placement.turn))
    corners = []
    for x, y in outline(shape):
        turned_x, turned_y = x * cosine - y * sine, x * sine + y * cosine
        corners.append(
            ((placement.x + placement.radius * turned_x) * scale, (placement.y + placement.radius * turned_y) * scale)
        )
    ImageDraw.Draw(canvas).polygon(corners, fill=tuple(colour))
    return canvas.resize((SIZE, SIZE), Image.Resampling.BOX)


def drawn_at_random(shape: str, colour: str, ground: str, rng: random.Random) -> Image.Image:
    """A picture with place, size, turn and a slight change of colour drawn from `rng`."""
    jittered = [min(255, max(0, channel + rng.randint(-10, 10))) for channel in COLOURS[colour]]
    level = rng.randint(-5, 5)
    tinted = [min(255, max(0, channel + level)) for channel in GROUNDS[ground]]
    return draw(shape, jittered, tinted, Placement.drawn(rng))


def caption(shape: str, colour: str, ground: str) -> str:
    """The caption that goes with a picture: `a red circle on white`."""
    article = "an" if colour[0] in "aeiou" else "a"
    return f"{article} {colour} {shape} on {ground}"
