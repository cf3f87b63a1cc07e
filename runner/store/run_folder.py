"""runs/<name>/: the folder that people look into. Everything in it can be made again from the store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

from runner.atomic import link_or_copy, remove
from runner.errors import Invalid
from runner.records import DamagedRecord, Maybe, read_record, write_record
from runner.store.store import Store


def sample_name(step: int, weights: str, prompt: int) -> str:
    """`step-00000050-prompt-01`; the average's pictures have `-ema` behind the step."""
    suffix = "" if weights == "raw" else f"-{weights}"
    return f"step-{step:08d}{suffix}-prompt-{prompt + 1:02d}"


def checkpoint_name(step: int, weights: str) -> str:
    suffix = "" if weights == "raw" else f"-{weights}"
    return f"step-{step:08d}{suffix}.safetensors"


class Shown(Protocol):
    """What naming a sample needs of its prompt."""

    @property
    def index(self) -> int: ...

    @property
    def is_video(self) -> bool: ...


def sample_files(store: Store, key: str, prompt: Shown) -> list[Path]:
    """The files of a sample that people look at: a picture, or a video and its settings."""
    return [store.item(kind, key) for kind in (("videos", "settings") if prompt.is_video else ("samples",))]


def show_sample(store: Store, key: str, output_dir: Path, step: int, weights: str, prompt: Shown) -> list[Path]:
    """Shows a sample of the store in the run's folder; returns where."""
    places = []
    for file in sample_files(store, key, prompt):
        if file.is_file():
            places.append(output_dir / "samples" / f"{sample_name(step, weights, prompt.index)}{file.suffix}")
            link_or_copy(file, places[-1])
    return places


PIN = "pin.json"
PIN_TRAINING = "train"
"""The key of the training's fingerprint in it."""
DRAWN = "seeds.json"
SEEDS = 2**32
"""A drawn seed is below that."""


def read_pin(output_dir: Path) -> dict[str, Any] | None:
    """The checkpoint that was chosen by hand with `runner select --step`."""
    file, way_out = output_dir / PIN, "choose again with `runner select --step`"
    pin = _read(file, {"step": int, "weights": str, PIN_TRAINING: Maybe(str)}, way_out)
    if pin is not None and (pin["step"] < 1 or pin["weights"] not in ("raw", "ema")):
        raise _damaged(file, "no checkpoint is called so", way_out)
    return pin


def write_pin(output_dir: Path, step: int, weights: str, train: str) -> None:
    """`train` is the fingerprint of the training that the checkpoint is of."""
    write_record(output_dir / PIN, {"version": 1, "step": step, "weights": weights, PIN_TRAINING: train})


def clear_pin(output_dir: Path) -> None:
    remove(output_dir / PIN)


def read_drawn_seeds(output_dir: Path) -> dict[int, int]:
    """Prompt index → the seed that was drawn for a prompt with seed = -1."""
    file, way_out = output_dir / DRAWN, "new seeds are drawn at the next apply"
    content = _read(file, {"seeds": dict}, way_out) or {"seeds": {}}
    for index, seed in content["seeds"].items():
        if not (index.isascii() and index.isdigit() and len(index) < 9 and type(seed) is int and 0 <= seed < SEEDS):
            raise _damaged(file, "its seeds are no numbers", way_out)
    return {int(index): seed for index, seed in content["seeds"].items()}


def write_drawn_seeds(output_dir: Path, seeds: dict[int, int]) -> None:
    write_record(
        output_dir / DRAWN, {"version": 1, "seeds": {str(index): seed for index, seed in sorted(seeds.items())}}
    )


def _read(file: Path, shape: dict[str, Any], way_out: str) -> dict[str, Any] | None:
    """What a person decided, or a draw: nothing else knows it, so a damaged one is an error."""
    try:
        return read_record(file, shape)
    except DamagedRecord as error:
        raise _damaged(file, str(error), way_out) from None


def _damaged(file: Path, reason: str, way_out: str) -> Invalid:
    return Invalid(f"{file} is damaged: {reason}", hint=f"delete it; {way_out}")


def sample_stem(step: int | None, weights: str, label: str, prompt: int) -> str:
    """The name of a picture made by `runner sample`; weights from a file are called by the file's name."""
    if step is not None:
        return sample_name(step, weights, prompt)
    return f"{Path(label).stem}-prompt-{prompt + 1:02d}"


def free_name(path: Path, content: bytes) -> Path:
    """`path`, or with a number behind it where another picture has that name."""
    number = 1
    candidate = path
    while os.path.lexists(candidate) and not _holds(candidate, content):
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content
