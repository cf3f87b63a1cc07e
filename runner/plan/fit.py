"""`runner plan --fit 12GB`: the fastest settings whose predicted memory fits, and why each of them; torch-free.

The fastest set of remedies (remedies.py) whose predicted peak fits is searched, and is shown only after it went through
all checks of a run.toml as if it stood there: what is shown is what the plan with these settings says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from runner.config.load import changed
from runner.errors import InvalidConfig
from runner.families.spec import MemoryQuestion
from runner.plan.diff import Plan, make_plan
from runner.plan.estimate import LIBRARIES, memory_question
from runner.plan.prepare import prepare
from runner.plan.remedies import CACHING, Remedy, remedies
from runner.plan.stages.cache import LATENTS, TEXTS
from runner.plan.stages.train import trained_numbers

LEAST, MOST = 10**9, 10**12
"""Bytes of memory that a GPU may be said to have: 8192, which is meant in MiB, is not taken for GB."""
ATTEMPTS = 20
"""Proposals that are checked before the search gives up."""
_GB = 10**9
_UNITS = {"": _GB, "G": _GB, "GB": _GB, "GIB": 2**30, "M": 10**6, "MB": 10**6, "MIB": 2**20, "T": 10**12, "TB": 10**12}
_CACHES = (LATENTS.name, TEXTS.name)
Chosen = tuple[Remedy, ...]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A proposal. `steps` has for each remedy what the peak is with it and all before it, the libraries included."""

    limit: int
    before: int
    after: int
    phase: str
    slower: float
    steps: tuple[tuple[Remedy, int], ...]

    @property
    def fits(self) -> bool:
        return self.after <= self.limit

    @property
    def settings(self) -> dict[str, Any]:
        return settings_of([remedy for remedy, _ in self.steps])

    def as_record(self) -> dict[str, Any]:
        return {
            "limit_bytes": self.limit,
            "predicted_before_bytes": self.before,
            "predicted_after_bytes": self.after,
            "fits": self.fits,
            "step_time_factor": round(self.slower, 3),
            "settings": self.settings,
            "reasons": [
                {"settings": dict(remedy.settings), "why": remedy.why, "peak_bytes": peak}
                for remedy, peak in self.steps
            ],
        }


def parse_memory(text: str) -> int | None:
    """Bytes of "12GB", "11.5 GiB" or "8000MB", a plain number being GB; None where it is no size that a GPU has."""
    match = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None:
        return None
    size = int(float(match.group(1)) * unit)
    return size if LEAST <= size <= MOST else None


def settings_of(chosen: Sequence[Remedy]) -> dict[str, Any]:
    """The keys that these remedies set."""
    return {key: value for remedy in chosen for key, value in remedy.settings.items()}


def fit(plan: Plan, limit: int) -> Fit:
    """The fastest settings that fit into `limit` bytes of a GPU; the leanest ones where none do."""
    search = _Search(plan, limit - LIBRARIES["cuda"])
    for _ in range(ATTEMPTS):
        chosen = search.best()
        question = search.checked(chosen)
        if question is not None:
            return search.result(chosen, question, limit)
        search.refused.add(_names(chosen))
    return search.result((), search.question, limit)


class _Search:
    def __init__(self, plan: Plan, room: int) -> None:
        self.plan, self.room = plan, room
        self.question = memory_question(plan, trained_numbers(plan.prepared)[0], "cuda")
        self.refused: set[frozenset[str]] = set()
        """Proposals that looked well and did not pass."""
        self._valid: dict[frozenset[str], bool] = {frozenset(): True}
        self._peaks: dict[tuple[bool, frozenset[str]], float] = {}
        groups = [[remedy for remedy in group if self.valid((remedy,))] for group in remedies(plan, self.question)]
        cached = self.question.text_cached and not set(self.question.trains) & set(self.question.model.text_encoders)
        own = CACHING if cached else tuple(name for name in CACHING if name != "text")
        groups = sorted((group for group in groups if group), key=lambda group: -max(r.slower for r in group))
        self.caching = [group for group in groups if group[0].group in own]
        self.training = [group for group in groups if group[0].group not in own]

    def best(self) -> Chosen:
        """What training needs, then what caching needs with that: neither changes the other's phases for the worse."""
        chosen: Chosen = ()
        for groups, caching in ((self.training, False), (self.caching, True)):
            found = self._fastest(groups, chosen, caching, self.room)
            chosen = self._leanest(groups, chosen, caching) if found is None else found
        return chosen

    def _fastest(self, groups: Sequence[list[Remedy]], given: Chosen, caching: bool, room: float) -> Chosen | None:
        """`given` and the fastest choice of the groups whose phases fit into `room`, by branch and bound: a choice is
        followed only where the leanest of what is still open fits and it is not slower than what is known."""
        found: list[tuple[tuple[float, int], Chosen]] = []

        def follow(index: int, chosen: Chosen) -> None:
            cost = _cost(chosen)
            if found and cost >= found[0][0]:
                return
            leanest = tuple(group[-1] for group in groups[index:])
            if self.peak(chosen + leanest, caching) > room:
                return
            if index == len(groups):
                if self.valid(chosen) and _names(chosen) not in self.refused:
                    found[:] = [(cost, chosen)]
                return
            for remedy in (None, *sorted(groups[index], key=lambda remedy: remedy.slower)):
                follow(index + 1, chosen if remedy is None else (*chosen, remedy))

        follow(0, given)
        return found[0][1] if found else None

    def _leanest(self, groups: Sequence[list[Remedy]], given: Chosen, caching: bool) -> Chosen:
        """The choice of the lowest peak, and the fastest of those."""
        chosen = given
        for remedy in (remedy for group in groups for remedy in reversed(group)):
            more = (*chosen, remedy)
            taken = any(remedy.group == other.group for other in chosen)
            if not taken and self.valid(more) and _names(more) not in self.refused:
                chosen = more
        while True:
            better = self._fastest(groups, given, caching, self.peak(chosen, caching) * 0.995)
            if better is None:
                break
            chosen = better
        return self._fastest(groups, given, caching, self.peak(chosen, caching)) or chosen

    def peak(self, chosen: Chosen, caching: bool) -> float:
        """The highest phase of caching, or of everything after it."""
        key = caching, _names(chosen)
        if key not in self._peaks:
            phases = self.plan.prepared.spec.memory(_changed(self.question, chosen)).phases
            for kind in (True, False):
                own = [size for name, size in phases.items() if (name in _CACHES) == kind]
                self._peaks[kind, key[1]] = max(own, default=0)
        return self._peaks[key]

    def valid(self, chosen: Chosen) -> bool:
        """Whether run.toml may say all this, as far as it can be told without looking at the model and the pictures."""
        key = _names(chosen)
        if key not in self._valid:
            self._valid[key] = not changed(self.plan.prepared.source, settings_of(chosen)).errors
        return self._valid[key]

    def checked(self, chosen: Chosen) -> MemoryQuestion | None:
        """What the plan with these settings asks; None where they do not pass, or where it predicts more than was
        believed."""
        if not chosen:
            return self.question
        prepared = self.plan.prepared
        try:
            run = prepare(changed(prepared.source, settings_of(chosen)), prepared.store)
        except InvalidConfig:
            return None
        plan = make_plan(run)
        question = memory_question(plan, trained_numbers(plan.prepared)[0], "cuda")
        return question if prepared.spec.memory(question).peak <= max(self._whole_peak(chosen), self.room) else None

    def result(self, chosen: Chosen, question: MemoryQuestion, limit: int) -> Fit:
        """The proposal, its remedies in the order of what they save."""
        libraries, answer = LIBRARIES["cuda"], self.plan.prepared.spec.memory(question)
        ordered: Chosen = ()
        steps: list[tuple[Remedy, int]] = []
        while len(ordered) < len(chosen):
            left = [remedy for remedy in chosen if remedy not in ordered]
            ordered += (min(left, key=lambda remedy: self._whole_peak((*ordered, remedy))),)
            peak = answer.peak if len(left) == 1 else int(self._whole_peak(ordered))
            steps.append((ordered[-1], peak + libraries))
        before = int(self._whole_peak(())) + libraries
        return Fit(
            limit=limit,
            before=before,
            after=answer.peak + libraries,
            phase=answer.highest,
            slower=_cost(chosen)[0],
            steps=tuple(steps),
        )

    def _whole_peak(self, chosen: Chosen) -> float:
        return max(self.peak(chosen, caching) for caching in (True, False))


def _names(chosen: Sequence[Remedy]) -> frozenset[str]:
    return frozenset(f"{key}={value}" for key, value in settings_of(chosen).items())


def _cost(chosen: Sequence[Remedy]) -> tuple[float, int]:
    """How much longer a step takes, and how much there is to write."""
    return prod(remedy.slower for remedy in chosen), len(chosen)


def _changed(question: MemoryQuestion, chosen: Sequence[Remedy]) -> MemoryQuestion:
    for remedy in chosen:
        question = remedy.change(question)
    return question


def toml_lines(settings: Mapping[str, Any]) -> list[str]:
    """Settings as tables of run.toml."""
    tables: dict[str, list[str]] = {}
    for dotted, value in settings.items():
        table, _, key = dotted.rpartition(".")
        text = str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)
        tables.setdefault(table, []).append(f"{key} = {text}")
    return [line for table, lines in tables.items() for line in (f"[{table}]", *lines)]
