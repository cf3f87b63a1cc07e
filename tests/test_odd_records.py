"""Records, links and events of shapes that no run writes: each is named or left out, and hides no other run."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from runner.atomic import CannotWrite
from runner.core.events import Events, read_events
from runner.plan.history import Applied
from runner.records import DamagedRecord, Maybe, read_record
from runner.store.artifacts import read_selection
from runner.store.gc import keys_files
from runner.store.store import Store
from tests.commands import said
from tests.fuzzing import bounded
from tests.support import Place

RUN = {"file": "run.toml", "output_dir": "runs/t", "name": "t", "fingerprints": {"train": "ab"}}


@pytest.fixture
def empty(tmp_path: Path) -> Place:
    """A folder with a store in which one run is registered that was never trained."""
    place = Place(tmp_path)
    place.output.mkdir(parents=True)
    place.text("")
    registered(place, "t", RUN)
    return place


def store_of(place: Place) -> Store:
    return Store(place.folder / ".runner")


def registered(place: Place, name: str, record: dict[str, Any]) -> Path:
    """Without a digest, as an older runner wrote it."""
    file = store_of(place).root / "runs" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record))
    keys_files(file)[0].write_bytes(gzip.compress(b"{}"))
    return file


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"file": "a" * 5000}, "file: its name is too long: 255 bytes a part and 4,095 in all are the most"),
        ({"file": "a\0b"}, "file: its name holds a NUL character"),
        ({"file": "\ud800"}, "file: its name holds half a character (a lone surrogate)"),
        ({"output_dir": "b" * 300}, "output_dir: its name is too long: 255 bytes a part and 4,095 in all are the most"),
        ({"output_dir": "a\0b"}, "output_dir: its name holds a NUL character"),
        ({"shown": [1]}, "shown is no table"),
        ({"shown": {"train": 5}}, "shown.train has another type"),
        ({"settings": [5]}, "settings[] has another type"),
        ({"steps": "many"}, "steps has another type"),
        ({"complete": 1}, "complete has another type"),
    ],
)
def test_a_record_of_another_shape_hides_no_other_run(empty: Place, change: dict[str, Any], reason: str) -> None:
    broken = registered(empty, "0" * 16, {**RUN, **change})
    status = said(empty, "status", ".")
    assert (status.code, status.out.count("runs/t")) == (0, 1)
    assert status.err == (
        f"note: the record of a run is damaged: {broken} ({reason}); apply it again, or delete the record\n"
    )
    listed = said(empty, "gc", ".")
    assert (listed.code, listed.out) == (0, "")
    assert listed.err.startswith(f"note: the record of a run is damaged: {broken} ({reason})\nnote: nothing is deleted")


def test_what_a_record_may_lack(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    for content, problem in (({}, None), ({"a": None}, None), ({"a": {"b": 1}}, None), ({"a": {}}, "a.b is missing")):
        file.write_text(json.dumps(content))
        try:
            assert read_record(file, {"a": Maybe({"b": int})}) == content
            found = None
        except DamagedRecord as error:
            found = str(error)
        assert found == problem


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b'{"latents": 5}', b"\xff"])
def test_a_list_of_what_a_run_needs_that_is_none(empty: Place, content: bytes) -> None:
    file = store_of(empty).root / "runs" / "t.json"
    keys_files(file)[0].write_bytes(gzip.compress(content))
    listed = said(empty, "gc", ".")
    assert listed.err == "note: run 't' has no list of what it needs; nothing is deleted\nnothing to delete\n"
    items = file.with_suffix(".items.gz")
    items.write_bytes(gzip.compress(content))
    assert Applied({}, file).items == {}


def test_links_in_the_store_go_and_what_they_name_stays(empty: Place) -> None:
    store, outside = store_of(empty), empty.folder / "outside"
    outside.mkdir()
    (outside / "mine").write_text("x" * 1000)
    links = [store.root / "exports" / "link", store.root / "artifacts" / "train" / "link"]
    links += [store.item("latents", "ab" * 32), store.item("samples", "cd" * 32)]
    targets = [outside, outside, outside / "mine", outside / "gone"]
    for link, target in zip(links, targets, strict=True):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
    assert "exports                   1  " in said(empty, "gc", ".").out
    deleted = said(empty, "gc", ".", "--delete")
    assert (deleted.code, "deleted: " in deleted.err) == (0, True)
    assert not any(link.is_symlink() for link in links)
    assert (outside / "mine").read_text() == "x" * 1000


LINES = [
    '{"type": "step", "time": 1e300, "step": 1, "total": 2}',
    '{"type": "step", "time": NaN, "step": 1, "total": 2}',
    '{"type": "finished", "time": -1e18}',
    '{"type": "finished", "attempt": 1e999}',
    '{"type": "step", "step": Infinity, "total": 2}',
    f'{{"type": "step", "step": 1, "total": 2, "loss": {"9" * 400}}}',
    '{"type": "step", "step": 1, "total": 2, "loss": -Infinity}',
    '{"type": "step", "step": 1, "total": 1e308, "loss": 1}',
    '{"type": "resumed", "stage": "train", "step": NaN}',
]


@pytest.mark.parametrize("line", LINES)
def test_events_with_numbers_that_none_has(empty: Place, line: str) -> None:
    file = empty.output / "logs" / "events.jsonl"
    file.parent.mkdir()
    file.write_text(
        '{"type": "step", "stage": "train", "step": 3, "total": 6, "loss": 1e20, "time": 5}\n' + line + "\n"
    )
    assert [event["step"] for event in read_events(file)] == [3]
    assert said(empty, "status", ".").code == 0
    json.loads(said(empty, "status", ".", "--json").out, parse_constant=lambda name: pytest.fail(name))
    Events(file).close()


def test_a_log_that_is_a_pipe_is_not_waited_for(empty: Place) -> None:
    file = empty.output / "logs" / "events.jsonl"
    file.parent.mkdir()
    os.mkfifo(file)
    with bounded(5), pytest.raises(CannotWrite, match="it is a named pipe, not a file"):
        Events(file)
    assert said(empty, "status", ".").code == 0


SELECTION: dict[str, Any] = {
    "chosen": {"step": 2, "weights": "raw"},
    "reason": "",
    "decided_by": "runner",
    "metrics": [],
    "levels": [],
    "items": {"held_out": 0, "training": 2},
    "measured_on": "",
    "base": None,
    "candidates": [{"step": 2, "weights": "raw", "verdict": "chosen", "reason": ""}],
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"candidates": []}, "it chooses what was no candidate"),
        ({"chosen": {"step": 3, "weights": "raw"}}, "it chooses what was no candidate"),
        ({"chosen": {"step": 2, "weights": "../../x"}}, "it chooses what was no candidate"),
        ({"items": None}, "items is no table"),
        ({"levels": "x"}, "levels is no list"),
        ({"base": 5}, "base has another type"),
    ],
)
def test_a_selection_that_none_made(
    empty: Place, caplog: pytest.LogCaptureFixture, change: dict[str, Any], reason: str
) -> None:
    file = store_of(empty).artifact("select", "ab") / "selection.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(SELECTION))
    assert read_selection(store_of(empty), "ab") == SELECTION
    file.write_text(json.dumps({**SELECTION, **change}))
    assert read_selection(store_of(empty), "ab") is None
    assert caplog.messages == [f"{file} is damaged ({reason}); it is made again"]
