"""A choice by hand is for one training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from runner.errors import Stopped
from runner.inputs.select import SelectInputs
from runner.store.run_folder import read_pin
from tests.inprocess import Verbs, applied, planned, verb
from tests.support import Place, new_place

__all__ = ["verb"]
RATE = "training.learning_rate=1e-2"
DROPPED = (
    "step 2 was chosen by hand for another training; the rule chooses here, until `runner select run.toml --step N`"
)


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Place:
    """A finished run whose step 2 was chosen by hand."""
    from runner.plan.diff import current_graph
    from runner.store.run_folder import write_pin
    from tests.inprocess import prepared

    made = new_place(tmp_path_factory.mktemp("chosen") / "place", tiny_model)
    applied(made.file)
    write_pin(made.output, 2, "raw", current_graph(prepared(made.file)).fingerprint("train"))
    assert applied(made.file).selection["decided_by"] == "user"
    return made


@pytest.fixture
def pinned(chosen: Place, tmp_path: Path) -> Place:
    shutil.copytree(chosen.folder, tmp_path / "pinned", symlinks=True)
    return Place(tmp_path / "pinned")


def test_a_pin_stays_with_its_training(pinned: Place) -> None:
    assert planned(pinned.file).notes == []
    assert planned(pinned.file).graph.of(SelectInputs).pinned == {"version": 1, "step": 2, "weights": "raw"}
    other = planned(pinned.file, RATE)
    assert other.notes == [DROPPED]
    assert other.graph.of(SelectInputs).pinned is None
    outcome = applied(pinned.file, RATE)
    assert outcome.selection["decided_by"] == "runner"
    assert read_pin(pinned.output) is None
    assert planned(pinned.file).graph.of(SelectInputs).pinned is None, "it is not there again"


def test_an_extended_training_is_another_one(pinned: Place) -> None:
    assert planned(pinned.file, "training.max_train_steps=8").notes == [DROPPED]


@pytest.mark.parametrize("old", [False, True])
def test_a_pin_outlives_an_apply_that_was_not_done(pinned: Place, old: bool) -> None:
    """`old`: a pin from before the training was written into it is for what was applied last."""
    if old:
        pin = json.loads((pinned.output / "pin.json").read_text())
        pin.pop("train")
        pin.pop("sha256")
        (pinned.output / "pin.json").write_text(json.dumps(pin))
    assert planned(pinned.file).graph.of(SelectInputs).pinned is not None
    with pytest.raises(Stopped):
        applied(pinned.file, RATE, stop_at=1)
    assert planned(pinned.file, RATE).graph.of(SelectInputs).pinned is None
    assert not planned(pinned.file).actions["select"].pending


def test_select_writes_the_training_down(pinned: Place, verb: Verbs) -> None:
    verb(pinned, "select", "--step", "4").ok()
    assert read_pin(pinned.output) == {
        "version": 1,
        "step": 4,
        "weights": "raw",
        "train": planned(pinned.file).graph.fingerprint("train"),
    }
    assert planned(pinned.file).graph.of(SelectInputs).pinned == {"version": 1, "step": 4, "weights": "raw"}
    verb(pinned, "select").ok()
    assert read_pin(pinned.output) is None


NEW = "6 trained steps of run 't' give way in the run's folder"


def test_the_question_and_its_answer(pinned: Place, verb: Verbs) -> None:
    before = {path: path.stat().st_mtime_ns for path in pinned.output.rglob("*")}
    said_no = verb(pinned, "apply", "--set", RATE, answer="n\n")
    assert said_no.code == 64
    last = f"This trains anew: {NEW}, and stay in the store until `runner gc --delete`. Apply asks first, or needs --yes.\n"
    assert said_no.err.endswith(f"{last}{NEW} and stay in the store. Train anew? [y/N]: Nothing was done.\n")
    assert said_no.out == ""
    assert {path: path.stat().st_mtime_ns for path in pinned.output.rglob("*")} == before
    given_up = verb(pinned, "apply", "--set", RATE, answer="")
    assert (given_up.code, given_up.err[-12:]) == (130, "interrupted\n")
    said_yes = verb(pinned, "apply", "--set", RATE, answer="y\n").ok()
    assert "chosen: step" in said_yes.err
    assert planned(pinned.file).actions["train"].summary == "6 steps are trained", "they are still in the store"


def test_a_run_that_was_stopped_is_no_error(place: Place, verb: Verbs, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal

    from runner.cli.progress import Plain

    hear = Plain.hear

    def stop(self: Plain, event: dict[str, object]) -> None:
        hear(self, event)
        if event["type"] == "step" and event["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Plain, "hear", stop)
    result = verb(place, "apply")
    assert result.code == 130
    assert result.err.endswith(
        "stopping: the state is saved first; Ctrl+C again stops at once\n"
        "train: checkpoint at step 2\n"
        "stopped after step 3 of 6; the state is saved, apply again to go on\n"
    )
