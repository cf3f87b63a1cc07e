"""What the choice of a checkpoint is given; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from runner.dataset.encodings import TrainItem
from runner.dataset.item_facts import COLUMNS, column_facts
from runner.facts import KnownAfter, Tree, said, section, values
from runner.identity import fingerprint
from runner.inputs.cache import LatentEncoder, TextEncoder
from runner.inputs.sample import BaseModel
from runner.model.numerics import Numerics
from schemas.selection import Veto

SELECT_VERSION = 1


JUDGE_VERSION = 2
"""Of the rule alone: measurements stay."""


LEAST_FOR_ERROR = 12
"""Measured items below which their spread says too little: the lowest loss decides then, and no error is allowed for."""


@dataclass(frozen=True, kw_only=True)
class SelectInputs:
    """select: what is measured and how it is judged."""

    trajectory: str | KnownAfter
    base: BaseModel
    steps: tuple[int, ...]
    ema: bool
    seed: int
    strategy: str
    metrics: tuple[str, ...]
    step: int | None
    pinned: Mapping[str, Any] | None
    """A choice by hand: {"step", "weights"}."""
    veto: Veto
    held_out: tuple[TrainItem, ...]
    compared: tuple[TrainItem, ...]
    """Training items measured beside the held-out ones, for the gap; the only ones where nothing is held out."""
    numerics: Numerics
    encoders: tuple[LatentEncoder, TextEncoder]
    """What encodes the items."""
    pictures: Tree
    """The facts of the sample stage where the similarity veto looks at its pictures, else empty."""
    known_after: Mapping[str, str]
    """What is not known of the items yet (`Prepared.known_after`)."""

    def facts(self) -> Tree:
        return {
            "trajectory": said(self.trajectory),
            "base": self.base.facts(),
            "steps": said(self.steps),
            "ema": said(self.ema),
            "strategy": said(self.strategy, "selection.strategy"),
            "metrics": said(self.metrics, "selection.metrics"),
            "step": said(self.step, "selection.step"),
            "pinned": said(self.pinned),
            "veto": section(self.veto, "selection.veto"),
            "numerics": self.numerics.facts(),
            "pictures": self.pictures,
            **self._measured,
        }

    @cached_property
    def _measured(self) -> Tree:
        """What decides a candidate's losses beside its weights."""
        return {
            "seed": said(self.seed, "run.seed"),
            "held_out": column_facts(self.held_out, COLUMNS, self.known_after),
            "compared": column_facts(self.compared, COLUMNS, self.known_after),
            "latent_encoder": self.encoders[0].facts(),
            "text_encoder": self.encoders[1].facts(),
        }

    @cached_property
    def _settings(self) -> str:
        return fingerprint([SELECT_VERSION, self.numerics.values, values(self._measured)])

    def score_key(self, step: int, weights: str) -> str:
        """Key of one candidate's measurement. Step 0 is the base model."""
        which = ["base", self.base.identity] if step == 0 else [self.trajectory, step, weights]
        return fingerprint(["score", which, self._settings])
