"""Which frames a section of FramePack is made of, and where they stand in time; torch-free.

A clip of S * w + 1 latent frames has S sections of w frames. Inverted anti-drifting (arXiv 2504.12626, section 3.3) makes
the last section first, so that what is known of a section is its future; F1 goes forward and knows the past. Positions are
counted over a layout: [start, blank, section, next frame, 2 frames at half, 16 frames at a quarter of the resolution].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

ZERO = -1
"""A frame that is not there: zeros stand in its place."""
HISTORY = (1, 2, 16)
"""Known frames besides the start: at full, half and a quarter of the resolution."""


@dataclass(frozen=True)
class Layout:
    """Positions in time of the frames that are made and of those that are known."""

    target: tuple[int, ...]
    clean: tuple[int, ...]
    clean_2x: tuple[int, ...]
    clean_4x: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Section:
    """One section for training: latent frames of its clip (ZERO: zeros) and the layout of their positions."""

    index: int
    """Its place in time."""
    target: tuple[int, ...]
    clean: tuple[int, ...]
    clean_2x: tuple[int, ...]
    clean_4x: tuple[int, ...]
    layout: Layout


class SectionOf(NamedTuple):
    """Which section of a clip an item is: its place in time, of how many."""

    place: int
    sections: int
    window: int
    forward: bool
    """F1: it knows its past."""

    def frames(self) -> Section:
        return training_section(*self)


class OneFrame(NamedTuple):
    """Settings of one-frame training and inference: where the made frame and the known ones stand."""

    target_index: int
    clean_indices: tuple[int, ...]
    no_post: bool
    no_2x: bool
    no_4x: bool
    window: int

    def layout(self) -> Layout:
        """Positions; the frame after the section is zeros, and so is the history."""
        window = self.window
        post = () if self.no_post else (1 + window,)
        half = () if self.no_2x else (window + 2, window + 3)
        quarter = () if self.no_4x else tuple(range(window + 4, window + 20))
        return Layout((self.target_index,), (*self.clean_indices, *post), half, quarter)


def count_sections(frames: int, window: int, factor: int = 4) -> int:
    """Whole sections of a clip of so many frames; 0 where it is shorter than the least, `factor * window + 1`."""
    return ((frames - 1) // factor) // window if frames > 0 else 0


def frames_of(sections: int, window: int, factor: int = 4) -> int:
    """Frames of a video of so many sections."""
    return factor * sections * window + 1


def paddings(sections: int) -> list[int]:
    """How far ahead of a section's future it stands, in sections, in the order of generation (the last section first)."""
    if sections > 4:
        return [3, *[2] * (sections - 3), 1, 0]
    return list(reversed(range(sections)))


def inverted_layout(padding: int, window: int) -> Layout:
    """[start | padding * w blank | w made | next | 2 at half | 16 at a quarter]."""
    first = 1 + padding * window
    after = first + window
    return Layout(
        tuple(range(first, after)), (0, after), tuple(range(after + 1, after + 3)), tuple(range(after + 3, after + 19))
    )


def forward_layout(window: int) -> Layout:
    """F1's: [start | 16 at a quarter | 2 at half | the one before | w made]."""
    return Layout(tuple(range(20, 20 + window)), (0, 19), (17, 18), tuple(range(1, 17)))


def training_section(index: int, sections: int, window: int, f1: bool) -> Section:
    """Section `index` (in time) of a clip of so many sections."""
    target = tuple(range(1 + index * window, 1 + (index + 1) * window))
    if f1:
        known = tuple(range(1 + index * window))[-19:]
        past = (*[ZERO] * (19 - len(known)), *known)
        return Section(
            index=index,
            target=target,
            clean=(0, past[18]),
            clean_2x=past[16:18],
            clean_4x=past[:16],
            layout=forward_layout(window),
        )
    last = 1 + sections * window
    future = tuple(range(target[-1] + 1, min(target[-1] + 20, last)))
    future = (*future, *[ZERO] * (19 - len(future)))
    layout = inverted_layout(paddings(sections)[sections - 1 - index], window)
    return Section(
        index=index, target=target, clean=(0, future[0]), clean_2x=future[1:3], clean_4x=future[3:19], layout=layout
    )


def section_order(sections: int, f1: bool) -> Sequence[int]:
    """Sections in the order in which they are made."""
    return range(sections) if f1 else range(sections - 1, -1, -1)


def sections_for_seconds(seconds: float, window: int) -> int:
    """Sections of a video of so many seconds, at the 30 frames a second that FramePack was trained on."""
    return max(1, round(seconds * 30 / (window * 4)))
