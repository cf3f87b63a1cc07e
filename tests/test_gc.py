"""gc: refused while anything works with the store, and what a run's folder shows is kept."""

from __future__ import annotations

import multiprocessing
import os
import platform
import shutil
import time
from pathlib import Path

import pytest

from runner.errors import Held, Stopped
from runner.store.gc import collect_garbage, delete_garbage
from runner.store.lock import alone, in_use, is_held, run_held
from runner.store.store import Store, find_store
from tests.inprocess import Verbs, actions, applied, planned, verb
from tests.support import Place, new_place

__all__ = ["verb"]
RATE = "training.learning_rate=1e-2"


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Place:
    made = new_place(tmp_path_factory.mktemp("once") / "place", tiny_model)
    applied(made.file)
    return made


@pytest.fixture
def done(once: Place, tmp_path: Path) -> Place:
    """A copy of a finished run to change."""
    shutil.copytree(once.folder, tmp_path / "done", symlinks=True)
    return Place(tmp_path / "done")


def test_gc_is_refused_during_a_first_apply(place: Place, verb: Verbs) -> None:
    """From the lock on: the run is not registered yet."""
    store = find_store(place.folder)
    item = store.item("latents", "ab" * 32)
    with run_held(store, place.output, "t"):
        item.parent.mkdir(parents=True)
        item.write_bytes(b"needed")
        for arguments in (("gc",), ("gc", "--delete")):
            result = verb(place, *arguments)
            assert result.code == 5
            assert result.out == ""
            begin, _, end = result.err.partition(" since ")
            assert begin == f"error: run 't' is going on in process {os.getpid()} on {platform.node()}"
            assert end[19:] == "; nothing is deleted\nhint: wait for it, or stop that process\n\n"
        assert item.exists()
    assert "deleted: " in verb(place, "gc", "--delete").ok().err
    assert not item.exists()


def test_gc_is_refused_while_a_verb_reads_the_store(done: Place, verb: Verbs) -> None:
    store = find_store(done.folder)
    with in_use(store, "runner sample"):
        assert verb(done, "gc").err.startswith(f"error: runner sample is going on in process {os.getpid()} on ")
    assert verb(done, "gc").code == 0
    left = store.lock_file("use-1")
    left.write_text("")  # of a killed process
    assert verb(done, "gc").code == 0
    assert not left.exists()


def test_no_run_begins_while_gc_works(place: Place) -> None:
    store = find_store(place.folder)
    began = multiprocessing.get_context("spawn").Process(target=_begin, args=(store.root, place.output))
    with alone(store):
        began.start()
        time.sleep(1.5)
        assert not is_held(store.run_lock(place.output)), "the lock is taken behind gc's back"
    began.join(30)
    assert began.exitcode == 0
    assert (place.output / "began").is_file()


def _begin(root: Path, output: Path) -> None:
    with run_held(Store(root), output, "t"):
        output.mkdir(parents=True)
        (output / "began").write_text("")


def test_looking_whether_a_run_is_held_does_not_refuse_it(place: Place) -> None:
    store = find_store(place.folder)
    file = store.run_lock(place.output)
    context = multiprocessing.get_context("spawn")
    with run_held(store, place.output, "t"):
        pass
    looking = context.Process(target=_look, args=(file, place.folder / "looks"))
    looking.start()
    while not (place.folder / "looks").exists():
        time.sleep(0.05)
    with run_held(store, place.output, "t"):
        looking.join()
    refused = pytest.raises(Held, match=rf"^run 't' is held by process {os.getpid()} on ")
    with run_held(store, place.output, "t"), refused, run_held(store, place.output, "t"):
        pass


def _look(file: Path, sign: Path) -> None:
    from filelock import FileLock

    with FileLock(file):
        sign.write_text("")
        time.sleep(0.15)


def deleted(place: Place) -> None:
    store = find_store(place.folder)
    with alone(store):
        delete_garbage(store, collect_garbage(store))


def test_gc_keeps_what_the_folder_shows_until_the_next_apply_is_done(done: Place) -> None:
    with pytest.raises(Stopped):
        applied(done.file, RATE, stop_at=2)
    deleted(done)
    assert set(actions(planned(done.file)).values()) == {"="}, "the folder still shows it"
    assert planned(done.file, RATE).actions["train"].summary == "continue from step 3 of 6"
    with pytest.raises(Stopped):
        applied(done.file, RATE, stop_at=4)
    deleted(done)
    assert set(actions(planned(done.file)).values()) == {"="}, "a second attempt changes nothing of that"
    applied(done.file, RATE)
    deleted(done)
    assert set(actions(planned(done.file, RATE)).values()) == {"="}
    assert actions(planned(done.file))["train"] == "-/+"


def test_gc_where_there_is_no_store(tmp_path: Path, tiny_model: Path, verb: Verbs) -> None:
    empty = Place(tmp_path)
    assert verb(empty, "gc").ok().err == f"nothing to delete: there is no store {tmp_path / '.runner'} yet\n"
    assert list(tmp_path.iterdir()) == []
