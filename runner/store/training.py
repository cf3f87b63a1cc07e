"""The folder of a training, in progress or finished, as planning sees it: torch-free, by names and small JSON files."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from runner.records import NUMBER, DamagedRecord, read_record, sound_record
from runner.store.index import Stamp, stamp

MANIFEST = "train.json"
RECORD = "workspace.json"
CHECKPOINT = "manifest.json"
MANIFEST_VERSION = 1
MOST_THREADS = 4096
BEGUN = {"trajectory": str, "threads": int, "bits": dict}
FINISHED = {**BEGUN, "steps": int, "checkpoints": [int], "history": [{"step": int}], "seconds_per_step": NUMBER}


KnownDigest = Callable[[Path], str | None]
"""A file's digest where it is known without reading it."""


def checkpoint_digests(folder: Path) -> dict[str, str]:
    """File name → digest of a checkpoint's folder; empty for one of an older runner. Raises `DamagedRecord`."""
    record = read_record(folder / CHECKPOINT, {"files": {str: str}})
    return dict(record["files"]) if record is not None else {}


def named_steps(steps: Sequence[int]) -> str:
    """`the checkpoint of step 2` or `the checkpoints of steps 2, 4`."""
    return f"the checkpoint{'s' * (len(steps) > 1)} of step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))}"


def numbered(folder: Path, prefix: str) -> dict[int, Path]:
    """Number → folder `<prefix>00000050`; whatever else lies there is none of ours."""
    if not folder.is_dir():
        return {}
    found = {}
    for entry in folder.iterdir():
        named = re.fullmatch(re.escape(prefix) + r"([0-9]{8,18})", entry.name)
        if named is not None and entry.is_dir():
            found[int(named[1])] = entry
    return found


@lru_cache(maxsize=8)
def _finished(file: Path, _: Stamp) -> dict[str, Any] | None:
    return sound_record(file, FINISHED, "the training is finished again from its last state")


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

    def is_finished(self, known_digest: KnownDigest) -> bool:
        """Whether the training's record is sound and no checkpoint is gone or known to be damaged."""
        return self.finished_record() is not None and not self.damaged_steps(known_digest)

    def damaged_steps(self, known_digest: KnownDigest) -> list[int]:
        """The recorded checkpoints that lack a file, or have one that was read and is not what was written. Reads none."""
        manifest = self.finished_record()
        there = numbered(self.checkpoints, "step-")
        found = []
        for step in manifest["checkpoints"] if manifest is not None else ():
            try:
                digests = checkpoint_digests(there[step]) if step in there else {"": ""}
            except DamagedRecord:
                digests = {"": ""}
            files = {there[step] / name: digest for name, digest in digests.items() if name}
            if "" in digests or any(not f.is_file() or known_digest(f) not in (None, d) for f, d in files.items()):
                found.append(step)
        return found

    def finished_record(self) -> dict[str, Any] | None:
        """What a finished training recorded; None where there is none, or a damaged one."""
        file = self.path / MANIFEST
        try:
            stat = file.stat()
        except OSError:
            return None
        return _finished(file, stamp(stat))

    def record(self) -> dict[str, Any] | None:
        """What a training in progress, or a finished one, recorded of its trajectory, threads and bits."""
        record = self.finished_record() or sound_record(self.path / RECORD, BEGUN)
        return record if record is not None and 1 <= record["threads"] <= MOST_THREADS else None

    def newest_step(self) -> int | None:
        """The step of the newest state, by its name alone."""
        return max(numbered(self.states, "state-"), default=None)

    def checkpoint_steps(self) -> list[int]:
        """The steps that there are checkpoints of, ascending."""
        there = numbered(self.checkpoints, "step-")
        manifest = self.finished_record()
        return sorted(step for step in there if manifest is None or step in manifest["checkpoints"])

    def gaps(self, planned: Sequence[int], keep: int | None) -> list[int]:
        """The checkpoints up to the newest state that should be there and are not, ascending. Where training keeps only
        some, only its record knows which."""
        manifest, newest = self.finished_record(), self.newest_step() or 0
        if keep is not None:
            planned = manifest["checkpoints"] if manifest is not None else ()
        there = numbered(self.checkpoints, "step-")
        return [step for step in sorted(planned) if step <= newest and step not in there]


def longest_of(folders: list[TrainFolder], trajectory: str, up_to: int) -> tuple[int, TrainFolder] | None:
    """Of the trainings on a trajectory, the one whose newest state is farthest, but not beyond `up_to`."""
    best: tuple[int, TrainFolder] | None = None
    for folder in folders:
        step = folder.newest_step()
        if step is None or step > up_to or (best is not None and step <= best[0]):
            continue
        record = folder.record()
        if record is not None and record["trajectory"] == trajectory:
            best = (step, folder)
    return best
