"""The index is a cache: however it is damaged, it is set aside and made anew from the files of the store."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.errors import RunFailed
from runner.store.index import FileContent, Index, stamp
from runner.store.store import Store

PAGE = 4096


def filled(root: Path, items: int = 400) -> Store:
    """A store with items on the disk and in the index, and a picture that is known; closed, so that all is in one file."""
    store = Store(root)
    keys = [f"{number:064x}" for number in range(items)]
    for key in keys:
        file = store.item("latents", key)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"content")
    store.index.add_items("latents", [(key, 7) for key in keys])
    picture = root / "picture.png"
    picture.write_bytes(b"a picture")
    store.index.put_files(str(root), [("picture.png", stamp(picture.stat()), FileContent("d" * 64, 8, 8))])
    store.index.close()
    return Store(root)


def overwritten(file: Path, at: int, content: bytes) -> None:
    raw = bytearray(file.read_bytes())
    raw[at : at + len(content)] = content
    file.write_bytes(raw)


def middle(file: Path) -> None:
    pages = file.stat().st_size // PAGE
    assert pages > 6
    for page in range(2, pages):
        overwritten(file, page * PAGE, b"\xa5" * 512)


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()
    (file / "something").write_text("x")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "middle": middle,
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "garbage": lambda file: file.write_bytes(b"garbage " * 1000),
    "header": lambda file: overwritten(file, 0, b"\x00" * 16),
    "folder": folder,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_index_is_made_anew_without_losing_items(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    store = filled(tmp_path / ".runner")
    file = store.root / "index.sqlite"
    DAMAGE[how](file)
    with caplog.at_level(logging.WARNING):
        assert len(store.index.item_keys("latents")) == 400
        assert store.index.unchanged(str(store.root), ["picture.png"]).keys() <= {"picture.png"}
        store.index.add_items("text", [("a", 1)])
        assert store.index.measured("x") is None
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        f"the store's index {file} was damaged"
    ]
    assert "it is made anew from the files of the store" in caplog.text
    assert (store.root / "index.sqlite.damaged").exists()
    assert Store(store.root).index.item_keys("text") == {"a"}


def test_an_empty_index_begins_with_the_stores_items(tmp_path: Path) -> None:
    for gone in (lambda file: file.write_bytes(b""), lambda file: file.unlink()):
        store = filled(tmp_path / ".runner")
        gone(store.root / "index.sqlite")
        assert len(store.index.item_keys("latents")) == 400


def test_a_flipped_bit_in_a_row_is_no_other_digest(tmp_path: Path) -> None:
    store = filled(tmp_path / ".runner")
    file = store.root / "index.sqlite"
    at = file.read_bytes().index(b"d" * 64)
    overwritten(file, at + 5, b"e")
    assert store.index.unchanged(str(store.root), ["picture.png"]) == {}
    assert store.index.known_digest(store.root / "picture.png") is None


def test_a_lost_table_is_damage(tmp_path: Path) -> None:
    store = filled(tmp_path / ".runner")
    connection = sqlite3.connect(store.root / "index.sqlite")
    connection.execute("drop table items")
    connection.close()
    assert len(store.index.item_keys("latents")) == 400


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (sqlite3.SQLITE_FULL, "the disk is full: {} cannot be written"),
        (sqlite3.SQLITE_READONLY, "{} cannot be written: it is read-only"),
        (sqlite3.SQLITE_BUSY, "{} is locked by another process"),
        (sqlite3.SQLITE_CANTOPEN, "{} cannot be written: it cannot be opened"),
        (
            sqlite3.SQLITE_IOERR_FSYNC,
            "{} cannot be written: the disk has an error, or has no such locks as SQLite needs",
        ),
    ],
)
def test_what_the_disk_does_is_named(tmp_path: Path, code: int, message: str) -> None:
    """And the index is left as it is: nothing is wrong with it."""

    class Failing:
        def execute(self, *_: object) -> None:
            error = sqlite3.OperationalError("said by SQLite")
            error.sqlite_errorcode = code
            raise error

    index = Index(tmp_path / "index.sqlite")
    index.connection.close()
    index.connection = Failing()  # type: ignore[assignment]
    with pytest.raises(RunFailed) as failed:
        index.item_keys("latents")
    assert str(failed.value) == message.format(tmp_path / "index.sqlite")
    assert not (tmp_path / "index.sqlite.damaged").exists()
