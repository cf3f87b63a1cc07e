"""A change of the structure changes no result: small runs of every family come to the recorded digests."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.digests import differences, read_recorded
from tests.support import ROOT


def compare(*which: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.digests", "--print", *which],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    recorded, now = read_recorded(), json.loads(done.stdout.splitlines()[-1])
    if now["probe"] not in recorded:
        pytest.skip("this processor computes other bits: record digests of your own before a change, compare after it")
    assert differences(recorded[now["probe"]], now["runs"]) == []


def test_some_runs_come_to_the_recorded_numbers() -> None:
    compare("--few")


@pytest.mark.slow
def test_every_run_comes_to_the_recorded_numbers() -> None:
    compare()


def test_what_differs_is_named() -> None:
    recorded = {"a": {"x": "1", "y": "2"}, "b": {"x": "3"}}
    now = {"a": {"x": "1", "y": "9", "z": "4"}}
    assert differences(recorded, now) == ["a: y", "a: z"]
