"""Aspect-ratio buckets by Kohya's rule (sd-scripts' BucketManager), and how a picture is resized and cropped into one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True, kw_only=True)
class BucketRule:
    """The settings of [dataset.buckets] with nothing left to derive."""

    resolution: Size
    enabled: bool
    min_size: int
    max_size: int
    step: int
    no_upscale: bool
    musubi: bool = False
    """The rule of musubi-tuner, for video models, in place of Kohya's."""

    @property
    def area(self) -> int:
        return self.resolution[0] * self.resolution[1]


@dataclass(frozen=True, kw_only=True)
class View:
    """How a picture is shown to the encoder: resized, cropped at (left, top) to the bucket, mirrored or not."""

    resized: Size
    left: int
    top: int
    bucket: Size
    flip: bool
    hue: int = 0
    """Turn of the hue, in degrees."""
    gamma: int = 100
    """In percent."""
    area: bool = False
    """Made smaller by averaging areas, as musubi-tuner does; else by Lanczos' filter."""

    @cached_property
    def facts(self) -> str:
        """The view in an encoding's key. Items of one fit share their view, so this is written once for all of them."""
        colours = f" {self.hue} {self.gamma}" if self.hue or self.gamma != 100 else ""
        area = " area" if self.area else ""
        return f"{self.resized} {self.left} {self.top} {self.bucket} {int(self.flip)}{colours}{area}"

    @property
    def corner(self) -> Size:
        """(left, top) of the crop in the picture as shown: mirrored, what was cut on the right is on the left."""
        return (self.resized[0] - self.left - self.bucket[0] if self.flip else self.left), self.top

    @cached_property
    def mirrored(self) -> View:
        """The same, mirrored."""
        return replace(self, flip=not self.flip)


@dataclass(frozen=True)
class Fit:
    """How a picture enters its bucket: resized to `resized` (which covers the bucket), then cropped to `bucket`."""

    bucket: Size
    resized: Size
    original: Size
    """The picture's own size."""
    area: bool = False
    """How it is made smaller (View.area)."""

    @cached_property
    def facts(self) -> str:
        """The fit in the digest of all items."""
        return f"{self.resized} {self.bucket}"

    @cached_property
    def centre(self) -> View:
        """The view without chance: used where nothing varies, and for held-out items."""
        left, top = (self.resized[0] - self.bucket[0]) // 2, (self.resized[1] - self.bucket[1]) // 2
        return View(resized=self.resized, left=left, top=top, bucket=self.bucket, flip=False, area=self.area)


def bucket_sizes(rule: BucketRule) -> list[Size]:
    """All buckets, sorted: the square, and for each width the tallest height within the area, both ways round."""
    if rule.musubi:
        return _musubi_sizes(rule)
    sizes: set[Size] = set()
    square = int(math.sqrt(rule.area) // rule.step) * rule.step
    if square > 0:
        sizes.add((square, square))
    for width in range(rule.min_size, rule.max_size + 1, rule.step):
        height = min(rule.max_size, int(rule.area // width // rule.step) * rule.step)
        if height >= rule.min_size:
            sizes.update({(width, height), (height, width)})
    return sorted(sizes)


def _musubi_sizes(rule: BucketRule) -> list[Size]:
    """musubi-tuner's buckets: from half the square's side to the side itself, both ways round."""
    sizes: set[Size] = set()
    side = int(math.sqrt(rule.area))
    first = side // 2 // rule.step * rule.step
    for width in range(max(first, rule.step), side + rule.step, rule.step):
        height = rule.area // width // rule.step * rule.step
        if min(width, height) >= rule.min_size and max(width, height) <= rule.max_size:
            sizes.update({(width, height), (height, width)})
    return sorted(sizes)


class Bucketing:
    """Fits pictures into the buckets of one rule; remembers by size, since a dataset has few sizes."""

    def __init__(self, rule: BucketRule) -> None:
        self.rule = rule
        self.sizes = bucket_sizes(rule)
        self._fits: dict[Size, Fit] = {}

    def fit(self, size: Size) -> Fit:
        """Where a picture of this size goes."""
        found = self._fits.get(size)
        if found is None:
            found = self._fit(size)
            found = self._fits[size] = replace(found, area=True) if self.rule.musubi else found
        return found

    def _fit(self, size: Size) -> Fit:
        if not self.rule.enabled:
            return Fit(self.rule.resolution, cover(size, self.rule.resolution), size)
        if self.rule.no_upscale and not self.rule.musubi:
            return _fit_no_upscale(size, self.rule)
        if self.rule.no_upscale and size[0] * size[1] <= self.rule.area:
            step = self.rule.step
            bucket = (size[0] // step * step, size[1] // step * step)
            return Fit(bucket, size, size)
        if size in self.sizes:
            return Fit(size, size, size)
        aspect = size[0] / size[1]
        bucket = min(self.sizes, key=lambda candidate: abs(candidate[0] / candidate[1] - aspect))
        return Fit(bucket, cover(size, bucket), size)


def cover(size: Size, bucket: Size) -> Size:
    """The smallest size of the picture's aspect that covers the bucket; the loose side is rounded half up."""
    width, height = size
    if width / height > bucket[0] / bucket[1]:
        return int(width * (bucket[1] / height) + 0.5), bucket[1]
    return bucket[0], int(height * (bucket[0] / width) + 0.5)


def _fit_no_upscale(size: Size, rule: BucketRule) -> Fit:
    width, height = size
    aspect = width / height
    resized = size
    if width * height > rule.area:
        ideal_width = math.sqrt(rule.area * aspect)
        ideal_height = rule.area / ideal_width
        by_width = _snap(ideal_width, rule.step)
        height_of_width = _snap(by_width / aspect, rule.step)
        by_height = _snap(ideal_height, rule.step)
        width_of_height = _snap(by_height * aspect, rule.step)
        width_error = abs(by_width / height_of_width - aspect) if height_of_width else math.inf
        height_error = abs(width_of_height / by_height - aspect) if by_height else math.inf
        if width_error < height_error:
            resized = (by_width, int(by_width / aspect + 0.5))
        else:
            resized = (int(by_height * aspect + 0.5), by_height)
    bucket = (resized[0] - resized[0] % rule.step, resized[1] - resized[1] % rule.step)
    return Fit(bucket, resized, size)


def _snap(value: float, step: int) -> int:
    rounded = int(value + 0.5)
    return rounded - rounded % step


def describe(counts: Sequence[tuple[Size, str, int]]) -> str:
    """`512x512 (40), 448x576 (3)`, `640x640 25 frames (8)`."""
    named = (f"{size[0]}x{size[1]}{' ' if layout else ''}{layout}" for size, layout, _ in counts)
    return ", ".join(f"{name} ({count})" for name, (_, _, count) in zip(named, counts, strict=True))
