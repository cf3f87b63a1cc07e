"""What a killed process left unfinished goes at the next apply; what is not ours, or is being written, stays."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.atomic import (
    CannotWrite,
    link_or_copy,
    link_or_copy_tree,
    new_file,
    new_folder,
    sweep,
    sweep_tree,
    temporary_for,
)

PROCESS = str(os.getpid())


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that is gone."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def leftover(path: Path, process: int) -> Path:
    temporary = temporary_for(path)
    return temporary.with_name(temporary.name.replace(f"-{PROCESS}-", f"-{process}-"))


def test_only_leftovers_of_the_dead_go(tmp_path: Path, dead: int) -> None:
    target = tmp_path / "best.safetensors"
    mine, old = leftover(target, dead), tmp_path / f".tmp-{dead}-best.safetensors"
    folder = leftover(tmp_path / "exports", dead)
    foreign = [
        leftover(target, os.getppid()),
        tmp_path / ".tmp-notes",
        tmp_path / f".tmp-{'0' * 8}-{dead}-best.safetensors",
        tmp_path / "best.safetensors",
        tmp_path / ".tmpfile",
    ]
    for path in (mine, old, *foreign):
        path.write_text("x")
    folder.mkdir()
    (folder / "weights").write_text("x")
    sweep(tmp_path, "best.safetensors")
    assert not mine.exists() and not old.exists()
    assert folder.exists(), "another name's"
    sweep_tree(tmp_path)
    assert not folder.exists()
    assert all(path.exists() for path in foreign)
    os.utime(foreign[1], (0, 0))
    os.utime(foreign[2], (0, 0))
    sweep_tree(tmp_path)
    assert [path.exists() for path in foreign] == [True, False, False, True, True], "too old for any process"


def test_a_long_name_has_a_temporary_name(tmp_path: Path, dead: int) -> None:
    target = tmp_path / ("ä" * 125 + ".txt")
    with new_file(target) as temporary:
        temporary.write_text("x")
    assert target.read_text() == "x"
    leftover(target, dead).write_text("x")
    sweep(tmp_path, target.name)
    assert os.listdir(tmp_path) == [target.name]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(CannotWrite) as caught, new_file(tmp_path / "taken") as temporary:
        temporary.write_text("x")
    assert (caught.value.errno, caught.value.filename) == (errno.EISDIR, str(tmp_path / "taken"))
    with pytest.raises(CannotWrite) as caught, new_folder(tmp_path / "folder") as staged:
        (staged / "a" / "b").write_text("x")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, str(tmp_path / "folder"))
    with pytest.raises(FileNotFoundError) as other, new_folder(tmp_path / "folder"):
        (tmp_path / "read").read_text()
    assert other.value.filename == str(tmp_path / "read"), "a file that is only read keeps its name"
    assert os.listdir(tmp_path) == ["taken"]


def test_a_failed_rename_of_a_link_falls_back_to_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, place = tmp_path / "source", tmp_path / "place"
    source.write_text("x")
    real, failures = os.replace, [OSError(errno.EIO, "Input/output error")]

    def replace(*arguments: str) -> None:
        if failures:
            raise failures.pop()
        real(*arguments)

    monkeypatch.setattr(os, "replace", replace)
    link_or_copy(source, place)
    assert place.read_text() == "x"
    assert not os.path.samefile(source, place)
    assert sorted(os.listdir(tmp_path)) == ["place", "source"]


def test_a_tree_is_linked_again_over_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "from" / "a").mkdir(parents=True)
    (tmp_path / "from" / "a" / "file").write_text("x")
    for _ in range(2):
        link_or_copy_tree(tmp_path / "from", tmp_path / "to")
    assert os.path.samefile(tmp_path / "from" / "a" / "file", tmp_path / "to" / "a" / "file")


def test_a_device_or_a_pipe_is_never_replaced(tmp_path: Path) -> None:
    """As root a rename onto /dev/null would take it from every program of the machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(CannotWrite) as caught, new_file(pipe):
        pass
    assert (caught.value.strerror, caught.value.filename) == ("it is a named pipe, not a file", str(pipe))
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]
