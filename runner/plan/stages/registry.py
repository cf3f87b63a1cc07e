"""The stages of a run, in order: those that come with runner, those of other packages, those that a test registers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import Any

from runner.errors import Invalid
from runner.plan.stage import Stage

GROUP = "runner.stages"
"""Python's entry points: a package outside of this repository brings stages by them."""
_BUILT_IN = (
    "runner.plan.stages.cache:LATENTS",
    "runner.plan.stages.cache:TEXTS",
    "runner.plan.stages.train:TRAIN",
    "runner.plan.stages.sample:SAMPLE",
    "runner.plan.stages.select:SELECT",
    "runner.plan.stages.publish:PUBLISH",
)
_registered: list[Stage[Any]] = []


def stages() -> tuple[Stage[Any], ...]:
    """All stages in the order in which they are done. Raises `Invalid` where a package's stage has no place."""
    return _ordered(tuple(_registered))


def targets() -> tuple[str, ...]:
    """What --target takes: the names of stages, and of several together before the first of them."""
    found: dict[str, None] = {}
    for stage in stages():
        found |= dict.fromkeys([stage.alias, stage.name] if stage.alias is not None else [stage.name])
    return tuple(found)


def words() -> dict[str, str]:
    """Stage → what it means that it is done again."""
    return {stage.name: stage.again for stage in stages()}


@contextmanager
def registered(stage: Stage[Any]) -> Iterator[None]:
    """Has one stage more for a while."""
    _registered.append(stage)
    try:
        yield
    finally:
        _registered.remove(stage)


@cache
def _ordered(more: tuple[Stage[Any], ...]) -> tuple[Stage[Any], ...]:
    found = [_load(address) for address in _BUILT_IN]
    for stage in (*(point.load() for point in entry_points(group=GROUP)), *more):
        names = [other.name for other in found]
        least = max((names.index(name) + 1 for name in stage.follows if name in names), default=0)
        most = min((names.index(name) for name in stage.before if name in names), default=len(found))
        if stage.name in names or least > most:
            why = "there is one of that name" if stage.name in names else "it would come before what it follows"
            raise Invalid(f"the stage {stage.name!r} has no place: {why}", hint="uninstall the package that brings it")
        found.insert(most if stage.before else least, stage)
    return tuple(found)


def _load(address: str) -> Stage[Any]:
    stage = resolve_name(address)
    assert isinstance(stage, Stage)
    return stage
