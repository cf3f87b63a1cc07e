"""Preparing, planning and training in this process, for tests that do it often."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest

from runner.config.load import load
from runner.errors import Stopped
from runner.plan.diff import Plan, make_plan
from runner.plan.prepare import Prepared, prepare
from runner.store.store import find_store
from tests.support import Place, Result


def prepared(file: Path, *settings: str) -> Prepared:
    """A checked run."""
    return prepare(load(file, settings), find_store(file.parent), may_defer=False)


def planned(file: Path, *settings: str) -> Plan:
    """Its plan."""
    return make_plan(prepared(file, *settings))


def planned_fast(file: Path, *settings: str) -> Plan:
    """A plan that does not wait for digests of large files."""
    return make_plan(prepare(load(file, settings), find_store(file.parent)))


def actions(plan: Plan) -> dict[str, str]:
    """Stage → symbol."""
    return {name: action.symbol for name, action in plan.actions.items()}


def applied(file: Path, *settings: str, until: str | None = None, stop_at: int | None = None) -> Any:
    """Applies without progress; `stop_at` asks to stop when that step is logged."""
    from runner.core.events import Events
    from runner.errors import Exit
    from runner.execute.apply import Apply
    from runner.stages.stop import StopFlag

    run = prepared(file, *settings)
    stop = StopFlag()

    def listen(event: dict[str, Any]) -> None:
        if stop_at is not None and event["type"] == "step" and event["step"] >= stop_at:
            stop.set(Exit.TERMINATED)

    events = Events(run.output_dir / "logs" / "events.jsonl", (listen,))
    try:
        return Apply(run, events, stop, until, "").run()
    finally:
        events.close()


def stopped_anew(place: Place, at: int) -> None:
    """Trains in an empty store and is asked to stop when step `at` is logged: it stops after the next one."""
    shutil.rmtree(place.folder / ".runner")
    with pytest.raises(Stopped, match=f"stopped after step {at + 1} of"):
        applied(place.file, until="train", stop_at=at)


def trained_bytes(file: Path, *settings: str) -> bytes:
    """The last checkpoint's bytes after training."""
    outcome = applied(file, *settings, until="train")
    run = prepared(file, *settings)
    folder = run.store.artifact("train", outcome.graph.fingerprint("train")) / "checkpoints"
    last = sorted(folder.iterdir())[-1]
    average = last / "ema.safetensors"
    return (last / "raw.safetensors").read_bytes() if not average.exists() else average.read_bytes()


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Verbs:
    """The command line in this process, in a place's folder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def __call__(self, place: Place, *arguments: str, answer: str | None = None) -> Result:
        """What a command gives back; with `answer`, on a terminal where that is typed."""
        from runner.cli.main import run

        self.monkeypatch.chdir(place.folder)
        self.monkeypatch.setenv("NO_COLOR", "1")
        self.monkeypatch.setattr("sys.argv", ["runner", *arguments])
        if answer is not None:
            self.monkeypatch.setattr("sys.stdin", _Terminal(answer))
        self.capfd.readouterr()
        code = int(run())
        return Result(code, *self.capfd.readouterr())


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Verbs:
    """The command line in this process."""
    return Verbs(monkeypatch, capfd)
