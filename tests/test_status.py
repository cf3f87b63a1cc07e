"""status tells runs apart: folder, date, losses, time, what they were applied with."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.inprocess import Verbs, applied, verb
from tests.support import Place, new_place

__all__ = ["verb"]
RATE = "training.learning_rate=1e-2"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Place:
    """Two runs of one name, each with a store of its own, in one folder."""
    parent = tmp_path_factory.mktemp("two")
    first = new_place(parent / "first", tiny_model)
    applied(first.file)
    shutil.copytree(first.folder, parent / "second", symlinks=True)
    second = Place(parent / "second")
    applied(second.file, RATE)
    second.file.write_text(second.file.read_text() + "\n# another\n")
    return Place(parent)


def test_two_runs_of_one_name(two: Place, verb: Verbs) -> None:
    text = verb(two, "status").ok().out
    head, first, second, *more = text.splitlines()
    assert head.split() == ["run", "state", "stage", "step", "loss", "chosen", "its", "loss", "took", "last", "folder"]
    pattern = (
        r"t    stopped  select  6/6   \d\.\d{4}  [246]       \d\.\d{4}    \d[\d hmins]* +\d{4}-\d\d-\d\d \d\d:\d\d  "
    )
    assert re.fullmatch(pattern + "first/runs/t", first), first
    assert re.fullmatch(pattern + "second/runs/t", second), second
    assert more == [
        f"second/runs/t: applied with --set {RATE}",
        "second/runs/t: run.toml was edited since it was applied",
    ]


def test_the_record_for_programs(two: Place, verb: Verbs) -> None:
    rows = json.loads(verb(two, "status", "--json").ok().out)
    assert [Path(row["file"]).parent.name for row in rows] == ["first", "second"]
    assert [(row["settings"], row["file_changed"]) for row in rows] == [([], False), ([RATE], True)]
    chosen = json.loads((two.folder / "second" / "runs" / "t" / "selection.json").read_text())
    loss = next(row["stable_loss"] for row in chosen["candidates"] if row["step"] == chosen["chosen"]["step"])
    assert rows[1]["chosen_loss"] == loss
    events = [json.loads(line) for line in (two.folder / "second/runs/t/logs/events.jsonl").read_text().splitlines()]
    own = [event["time"] for event in events if event["attempt"] == 2]
    assert rows[1]["seconds"] == round(own[-1] - own[0], 1), "the first training's time is not the second's"
    assert rows[1]["last_event"] == own[-1]


def test_one_file_and_an_empty_folder(two: Place, verb: Verbs, tmp_path: Path) -> None:
    text = verb(two, "status", "second/../first/run.toml").ok().out
    assert text.splitlines()[1].endswith("first/runs/t")
    assert len(text.splitlines()) == 2
    assert verb(two, "status", str(tmp_path)).ok().err == f"no runs yet in {tmp_path / '.runner'}\n"
