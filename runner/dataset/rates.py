"""What is to be said of videos whose frames are trained as they are stored: their rate, and how they are made."""

from __future__ import annotations

from runner.dataset.frames import GAPS, HDR, INTERLACED, OBLONG, VARIABLE
from runner.dataset.notes import Notes

NEAR = 0.05
"""Rates that differ by no more count as equal: 23.976, 24 and 25."""

_MADE = (
    (INTERLACED, "~are interlaced: each frame has lines of two moments", "ffmpeg -i IN -vf yadif OUT"),
    (
        OBLONG,
        "~have pixels that are not square, and ~are trained as stored",
        "ffmpeg -i IN -vf scale=iw*sar:ih,setsar=1 OUT",
    ),
    (
        GAPS,
        "~are folders whose frames have numbers that are left out or stand twice, and ~are trained as if they went on evenly",
        "add or remove frames, or make a folder of each part",
    ),
    (HDR, "~are HDR, and ~look pale, read as usual ones", "map ~them first: ffmpeg with zscale and tonemap"),
)


def note_making(name: str, facts: str, notes: Notes) -> None:
    """Notes on a video that looks otherwise on a screen than frame by frame."""
    for word, message, way_out in _MADE:
        if word in facts.split():
            notes.add(f"~videos {message}", way_out, [name])


def rate_of(facts: str) -> float | None:
    """Frames a second, where they are known."""
    return next((float(word[5:]) for word in facts.split() if word.startswith("rate=")), None)


def note_rate(name: str, facts: str, source_fps: float | None, fps: float, notes: Notes) -> None:
    """Notes on a video whose frames go to a model of so many frames a second."""
    rate = rate_of(facts)
    if rate is None:
        return
    if VARIABLE in facts:
        notes.add(
            "~videos ~have frames at uneven times, and ~are trained as if these were even",
            f"make ~them even first: ffmpeg -i IN -fps_mode cfr -r {fps:g} OUT",
            [f"{name}, {rate:.4g} fps in the mean"],
        )
    if source_fps is not None:
        if abs(rate / source_fps - 1) > NEAR:
            notes.add(
                f"~videos ~have another rate than source_fps = {source_fps:g} says",
                "say their own rate; a source for each rate, where they have several",
                [f"{name} has {rate:.4g}"],
            )
    elif rate > fps * (1 + NEAR):
        notes.add(
            f"~videos of {rate:.4g} fps ~are trained frame by frame at {fps:g} fps, {rate / fps:.2g} times slower than ~they ~are",
            f"source_fps = {rate:.4g} drops frames",
            [name],
        )
    elif rate < fps * (1 - NEAR):
        notes.add(
            f"~videos of {rate:.4g} fps ~are trained frame by frame at {fps:g} fps, {fps / rate:.2g} times faster than ~they ~are",
            f"no frames are made up; convert ~them first where that matters: ffmpeg -i IN -r {fps:g} OUT",
            [name],
        )
