"""The checkpoints of a training: `step-00000050/raw.safetensors`, and `ema.safetensors` where an average is kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from runner.atomic import new_folder
from runner.formats.headers import read_safetensors_header
from runner.formats.tensors import read_tensors, write_tensors


class Checkpoints:
    """One folder of checkpoints, in a workspace or an artifact."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int, weights: str = "raw") -> Path:
        return self.folder / f"step-{step:08d}" / f"{weights}.safetensors"

    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, ascending."""
        return sorted(int(entry.name.removeprefix("step-")) for entry in self.folder.glob("step-*"))

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
            for name, tensors in weights.items():
                write_tensors(staged / f"{name}.safetensors", tensors)

    def load(self, step: int, weights: str) -> dict[str, Tensor]:
        """The tensors of a checkpoint by their parameters' names."""
        file = self.path(step, weights)
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
                shutil.rmtree(self.path(step).parent)
