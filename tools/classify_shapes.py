"""A plain classifier of contours and colours for the micro model's pictures; no learned weights.

The shape's mask is the distance of each pixel from the ground's colour. Its contour is described by the distance from
the centre of mass to the edge in 72 directions, divided by the mean, and compared with the same profile of each drawn
shape over the turns that the drawing allows. The colour is the nearest named hue of the mask's inside.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from tools.draw_shapes import COLOURS, GROUNDS, SHAPES, SIZE, Placement, draw

DIRECTIONS = 72
WORST_DISTANCE = 0.2
"""A profile farther than this (root mean square) from every drawn shape is none of them. Drawn pictures
stay below 0.09. Of smooth random blobs, at 0.2, most are called a circle, one in seven a square, one in eight a heart
and none a star (tests/test_tools.py)."""


@dataclass(frozen=True)
class Verdict:
    """What the classifier sees; `shape` and `colour` are "none" where nothing is recognised."""

    shape: str
    colour: str
    ground: str
    distance: float


def classify(picture: Image.Image) -> Verdict:
    """Names the shape, its colour and the ground of a picture of any size."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground_colour = np.median(border, axis=0)
    ground = min(GROUNDS, key=lambda name: float(np.abs(ground_colour - np.array(GROUNDS[name])).sum()))
    mask = _mask(pixels, ground_colour)
    if mask is None:
        return Verdict("none", "none", ground, float("inf"))
    profile = _profile(mask)
    distances = {shape: _distance(profile, shape) for shape in SHAPES}
    shape = min(distances, key=lambda name: distances[name])
    colour = _colour(pixels[mask > 0.75])
    best = distances[shape]
    return Verdict(shape if best <= WORST_DISTANCE else "none", colour, ground, best)


def _mask(pixels: np.ndarray, ground: np.ndarray) -> np.ndarray | None:
    """[h, w] in 0..1: how far each pixel is from the ground; None where there is no shape to speak of."""
    difference = np.sqrt(((pixels - ground) ** 2).sum(axis=-1))
    top = float(np.percentile(difference, 92))
    if top < 60:
        return None
    mask = np.clip(difference / top, 0, 1)
    if not 0.06 < float((mask > 0.5).mean()) < 0.75:
        return None
    return mask


def _profile(mask: np.ndarray) -> np.ndarray:
    """[72]: how far the shape reaches from its centre of mass in each direction, over the mean reach."""
    height, width = mask.shape
    ys, xs = np.mgrid[0:height, 0:width]
    inside = mask > 0.5
    centre_y, centre_x = float(ys[inside].mean()), float(xs[inside].mean())
    angles = np.arange(DIRECTIONS) * (2 * np.pi / DIRECTIONS)
    reach = np.linspace(0, max(height, width) * 0.75, 4 * max(height, width))
    sample_y = centre_y + np.sin(angles)[:, None] * reach[None]
    sample_x = centre_x + np.cos(angles)[:, None] * reach[None]
    values = _bilinear(mask, sample_y, sample_x)
    lengths = (values > 0.5).sum(axis=1) * (reach[1] - reach[0])
    return lengths / max(float(lengths.mean()), 1e-6)


def _bilinear(grid: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    height, width = grid.shape
    outside = (y < 0) | (x < 0) | (y > height - 1) | (x > width - 1)
    y, x = np.clip(y, 0, height - 1.001), np.clip(x, 0, width - 1.001)
    top, left = y.astype(int), x.astype(int)
    dy, dx = y - top, x - left
    upper = grid[top, left] * (1 - dx) + grid[top, left + 1] * dx
    lower = grid[top + 1, left] * (1 - dx) + grid[top + 1, left + 1] * dx
    return np.where(outside, 0.0, upper * (1 - dy) + lower * dy)


@cache
def _drawn_profiles(shape: str) -> np.ndarray:
    """[turns, 72]: the profiles of the drawn shape, at the turns that the drawing uses and some more."""
    profiles = []
    for turn in range(-20, 21, 4):
        picture = draw(shape, (0, 0, 0), (255, 255, 255), Placement(10.5, SIZE / 2, SIZE / 2, turn))
        grey = 1 - np.asarray(picture.convert("L"), dtype=np.float32) / 255
        profiles.append(_profile(grey))
    return np.stack(profiles)


def _distance(profile: np.ndarray, shape: str) -> float:
    return float(np.sqrt(((_drawn_profiles(shape) - profile) ** 2).mean(axis=1)).min())


def _colour(inside: np.ndarray) -> str:
    if len(inside) == 0:
        return "none"
    red, green, blue = (float(value) / 255 for value in np.median(inside, axis=0))
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    if saturation < 0.35 or value < 0.25:
        return "none"

    def hue_distance(name: str) -> float:
        named_hue = colorsys.rgb_to_hsv(*(channel / 255 for channel in COLOURS[name]))[0]
        gap = abs(hue - named_hue)
        return min(gap, 1 - gap)

    return min(COLOURS, key=hue_distance)
