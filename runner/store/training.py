"""The folder of a training, in progress or finished, as planning sees it: torch-free, by names and small JSON files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "train.json"
RECORD = "workspace.json"
MANIFEST_VERSION = 1


@dataclass(frozen=True)
class TrainFolder:
    """A workspace (`workspace.json`) or an artifact (`train.json`)."""

    path: Path

    @property
    def states(self) -> Path:
        return self.path / "states"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        return (self.path / MANIFEST).is_file()

    def manifest(self) -> dict[str, Any]:
        """What a finished training recorded."""
        content: dict[str, Any] = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        return content

    def record(self) -> dict[str, Any] | None:
        """What a training in progress, or a finished one, recorded of its trajectory, threads and bits."""
        for name in (MANIFEST, RECORD):
            try:
                content: dict[str, Any] = json.loads((self.path / name).read_text(encoding="utf-8"))
                return content
            except (OSError, ValueError):
                continue
        return None

    def newest_step(self) -> int | None:
        """The step of the newest state, by its name alone."""
        names = sorted(entry.name for entry in self.states.glob("state-*")) if self.states.is_dir() else []
        return int(names[-1].removeprefix("state-")) if names else None

    def checkpoint_steps(self) -> list[int]:
        """The steps that there are checkpoints of, ascending."""
        return sorted(int(entry.name.removeprefix("step-")) for entry in self.checkpoints.glob("step-*"))


def longest_of(folders: list[TrainFolder], trajectory: str, up_to: int) -> tuple[int, TrainFolder] | None:
    """Of the trainings on a trajectory, the one whose newest state is farthest, but not beyond `up_to`."""
    best: tuple[int, TrainFolder] | None = None
    for folder in folders:
        record = folder.record()
        if record is None or record.get("trajectory") != trajectory:
            continue
        step = folder.newest_step()
        if step is not None and step <= up_to and (best is None or step > best[0]):
            best = (step, folder)
    return best
