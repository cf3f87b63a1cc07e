"""What publishing is given; torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from runner.facts import KnownAfter, Tree, said
from schemas.selection import Publish

PUBLISH_VERSION = 2


@dataclass(frozen=True)
class PublishInputs:
    """publish: where the chosen weights go."""

    select: str | KnownAfter
    targets: tuple[Publish, ...]
    dtype: str
    name: str

    def facts(self) -> Tree:
        return {
            "choice": said(self.select),
            "targets": said(list(self.targets), "selection.publish"),
            "dtype": said(self.dtype, "training.checkpoints.dtype"),
            "name": said(self.name, "run.name"),
        }
