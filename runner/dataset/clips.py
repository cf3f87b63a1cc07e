"""Which frames of a video are trained on: fps, windows, and how a clip is named in keys. musubi-tuner's rules; torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Extraction = Literal["head", "chunk", "slide", "uniform", "full"]


class Clip(NamedTuple):
    """Some frames of a video: `length` from `start`, counted after frames were dropped to reach the target fps."""

    start: int
    length: int
    source_fps: float | None
    """None: no frame is dropped."""
    target_fps: float

    @property
    def facts(self) -> str:
        """The clip in an encoding's key."""
        rate = "" if self.source_fps is None else f" {self.source_fps:g}>{self.target_fps:g}"
        return f"{self.start}+{self.length}{rate}"


@dataclass(frozen=True, kw_only=True)
class ClipOptions:
    """The video keys of a source."""

    target_frames: tuple[int, ...] = (1,)
    extraction: Extraction = "head"
    stride: int = 1
    sample: int = 1
    max_frames: int = 129
    source_fps: float | None = None


@dataclass(frozen=True, kw_only=True)
class ClipRule:
    """How a family reads videos."""

    fps: float
    factor: int
    """Frames of one latent frame."""


def kept_frames(count: int, source_fps: float | None, target_fps: float) -> Iterator[int]:
    """The frames that stay where the fps is lowered: those at which int(i * target / source) changes."""
    if source_fps is None or source_fps <= target_fps:
        yield from range(count)
        return
    last = -1
    for index in range(count):
        at = int(index * target_fps / source_fps)
        if at != last:
            yield index
            last = at


def count_kept(count: int, source_fps: float | None, target_fps: float) -> int:
    """How many frames stay."""
    if source_fps is None or source_fps <= target_fps or count == 0:
        return count
    return int((count - 1) * target_fps / source_fps) + 1


def whole(frames: int, factor: int = 4) -> int:
    """The largest number of the form factor * n + 1 that is no more."""
    return (frames - 1) // factor * factor + 1


def windows(count: int, options: ClipOptions, factor: int = 4) -> tuple[list[tuple[int, int]], list[int]]:
    """((start, length) of each window of a clip of `count` frames, the targets that it is too short for)."""
    if options.extraction == "full":
        return ([(0, whole(min(count, options.max_frames), factor))], []) if count else ([], [1])
    found: list[tuple[int, int]] = []
    missing = []
    for length in sorted({whole(target, factor) for target in options.target_frames}):
        if length > count:
            missing.append(length)
            continue
        found += [(start, length) for start in _starts(count, length, options)]
    return found, missing


def _starts(count: int, length: int, options: ClipOptions) -> Sequence[int]:
    if options.extraction == "chunk":
        return range(0, count - length + 1, length)
    if options.extraction == "slide":
        return range(0, count - length + 1, options.stride)
    if options.extraction == "uniform" and options.sample > 1:
        last, step = count - length, (count - length) / (options.sample - 1)  # as numpy's linspace rounds
        return list(dict.fromkeys([*(int(index * step) for index in range(options.sample - 1)), last]))
    return (0,)
