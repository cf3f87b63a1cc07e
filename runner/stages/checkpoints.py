"""The checkpoints of a training: `step-00000050/raw.safetensors`, and `ema.safetensors` where an average is kept.

Each carries a manifest.json with the digests of its files, which are held against it before they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from runner.atomic import new_folder, remove
from runner.errors import RunFailed
from runner.files import file_digest
from runner.records import DamagedRecord, write_record
from runner.store.training import CHECKPOINT, checkpoint_digests, numbered
from runner.weights.headers import read_safetensors_header
from runner.weights.tensors import read_tensors, write_tensors

CHECKPOINT_VERSION = 1


class DamagedCheckpoint(RunFailed):
    """A checkpoint's file is gone or is not what was written; apply trains it again."""

    kind = "checkpoint"

    def __init__(self, step: int, file: Path, reason: str) -> None:
        super().__init__(
            f"the checkpoint of step {step} is damaged: {file}: {reason}", hint="`runner apply` trains it again"
        )
        self.step = step


class Checkpoints:
    """One folder of checkpoints, in a workspace or an artifact. `digest` may remember what it has read."""

    def __init__(self, folder: Path, digest: Callable[[Path], str] = file_digest) -> None:
        self.folder, self.digest = folder, digest

    def path(self, step: int, weights: str = "raw") -> Path:
        return self.folder / f"step-{step:08d}" / f"{weights}.safetensors"

    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, ascending."""
        return sorted(numbered(self.folder, "step-"))

    def newest_name(self) -> str:
        """For messages."""
        steps = self.steps()
        return f"step {steps[-1]}" if steps else "none"

    def save(self, step: int, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Writes a checkpoint in the dtype of training; one that is there already holds the same bytes."""
        place = self.path(step).parent
        if place.exists():
            return
        with new_folder(place) as staged:
            digests = {}
            for name, tensors in weights.items():
                file = staged / f"{name}.safetensors"
                write_tensors(file, tensors)
                digests[file.name] = file_digest(file)
            write_record(staged / CHECKPOINT, {"version": CHECKPOINT_VERSION, "files": digests})

    def verified(self, step: int, weights: str) -> Path:
        """The file of a checkpoint, which is what was written. Raises `DamagedCheckpoint`."""
        file = self.path(step, weights)
        try:
            digests = checkpoint_digests(file.parent)
        except DamagedRecord as error:
            raise DamagedCheckpoint(step, error.file, str(error)) from None
        if not file.is_file():
            raise DamagedCheckpoint(step, file, "it is gone")
        # A checkpoint of an older runner has no manifest, and nothing to be held against.
        if digests and self.digest(file) != digests.get(file.name):
            raise DamagedCheckpoint(step, file, "it is not what was written")
        return file

    def drop_damaged(self) -> None:
        """Deletes every checkpoint that has a damaged file, so that it is trained again."""
        for step in self.steps():
            folder = self.path(step).parent
            try:
                for name in checkpoint_digests(folder) or ("raw.safetensors",):
                    self.verified(step, name.removesuffix(".safetensors"))
            except (DamagedCheckpoint, DamagedRecord):
                remove(folder)

    def load(self, step: int, weights: str) -> dict[str, Tensor]:
        """The tensors of a checkpoint by their parameters' names. Raises `DamagedCheckpoint`."""
        file = self.verified(step, weights)
        names = read_safetensors_header(file).tensors
        return read_tensors(file, {name: name for name in names}, None)

    def prune(self, keep: int, loss: Callable[[int], float]) -> None:
        """Drops all but the newest `keep` and the best of the rest by `loss`."""
        steps = self.steps()
        older = steps[:-keep]
        if not older:
            return
        best = min(steps, key=lambda step: (loss(step), step))
        for step in older:
            if step != best:
                remove(self.path(step).parent)
