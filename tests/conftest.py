"""Fixtures: the tiny model, made once a session, and places with runs on it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runner.core.process import prepare_environment

prepare_environment()
os.environ.pop("RUNNER_STORE", None)

from tests.support import Place, new_place  # noqa: E402


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers directory with the real classes and small random weights."""
    from runner.families.registry import family

    folder = tmp_path_factory.mktemp("tiny") / "model"
    family("sd15").tiny(folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path) -> Place:
    """A folder with the tiny model, ten pictures and a run.toml, fresh for each test."""
    return new_place(tmp_path / "place", tiny_model)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Place:
    """A run that was applied through the command line; tests only read it."""
    made = new_place(tmp_path_factory.mktemp("finished") / "place", tiny_model)
    made.run("apply").ok()
    return made
