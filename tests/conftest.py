"""Fixtures: the tiny model, made once a session, and places with runs on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.core.process import prepare_environment

prepare_environment()
os.environ.pop("RUNNER_STORE", None)

from runner.plan.prepare import Prepared  # noqa: E402
from tests.support import Place, family_changes, new_place  # noqa: E402


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers directory with the real classes and small random weights."""
    from runner.families.registry import family

    folder = tmp_path_factory.mktemp("tiny") / "model"
    family("sd15").tiny(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family → a diffusers directory of it, made once."""
    from runner.families.registry import family

    parent = tmp_path_factory.mktemp("tiny_models")

    def make(name: str) -> Path:
        if not (parent / name).exists():
            family(name).tiny(parent / name)
        return parent / name

    return make


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_models: Callable[[str], Path]) -> Callable[[str], Prepared]:
    """Family → a checked run of its tiny model."""
    from tests.inprocess import prepared

    made: dict[str, Prepared] = {}

    def make(name: str) -> Prepared:
        if name not in made:
            place = new_place(tmp_path_factory.mktemp("runs") / name, tiny_models(name))
            place.base = family_changes(name)
            made[name] = prepared(place.write({}))
        return made[name]

    return make


@pytest.fixture
def family_place(tmp_path: Path, tiny_models: Callable[[str], Path]) -> Callable[..., Place]:
    """Family → a place with its tiny model, whose run.toml names the family; changes are merged in."""

    def make(name: str, **changes: Any) -> Place:
        made = new_place(tmp_path / name, tiny_models(name))
        made.base = family_changes(name)
        made.write(changes)
        return made

    return make


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path) -> Place:
    """A folder with the tiny model, ten pictures and a run.toml, fresh for each test."""
    return new_place(tmp_path / "place", tiny_model)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Place:
    """A run that was applied through the command line; tests only read it."""
    made = new_place(tmp_path_factory.mktemp("finished") / "place", tiny_model)
    made.run("apply", fresh=True).ok()
    return made
