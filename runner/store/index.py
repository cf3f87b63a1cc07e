"""An SQLite index of what the store holds and of the outside files that were read.

`files` remembers a file's digest by (inode, size, mtime_ns, ctime_ns), with what reading it told: a picture's size or
why it cannot be decoded, a caption's text. `items` lists the encoded items, so that planning asks the disk nothing.
It is a cache: a damaged one is set aside and made anew from the files of the store.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from filelock import FileLock

from runner.atomic import make_folder, remove, rename
from runner.errors import RunFailed
from runner.files import file_digest
from runner.records import said

SCHEMA_VERSION = 3
ASIDE = "index.sqlite.damaged"
_CREATE = """
drop table if exists files;
create table files (
    folder text not null, name text not null, inode integer, size integer, mtime_ns integer, ctime_ns integer,
    digest text, width integer, height integer, text text, problem text, facts text, sum integer, primary key (folder, name)
) without rowid;
create table if not exists items (kind text not null, key text not null, bytes integer, primary key (kind, key)) without rowid;
create table if not exists measured (key text primary key, value real) without rowid;
"""
_DAMAGE = frozenset({sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_MISMATCH})
"""Codes that no sound index gives; SQLITE_ERROR is a table or a column that is gone."""
_FULL_BELOW = 2**20

P = ParamSpec("P")
T = TypeVar("T")


class FileContent(NamedTuple):
    """What reading a file told. `problem` says why a picture or a caption cannot be used."""

    digest: str
    width: int = 0
    height: int = 0
    text: str | None = None
    problem: str | None = None
    facts: str = ""
    """What else is to be known of a picture or video, in words: runner/pictures.py, runner/dataset/frames.py."""


_CONTENT = ", ".join(FileContent._fields)

Stamp = tuple[int, int, int, int]
"""What tells that a file has not changed: (inode, size, mtime_ns, ctime_ns)."""


def stamp(stat: os.stat_result) -> Stamp:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _sum(name: str, content: Iterable[Any]) -> int:
    """SQLite has no checksums: a bit that flips in a row would be another picture's digest."""
    return zlib.crc32("\x1f".join(map(str, (name, *content))).encode("utf-8", "surrogatepass"))


def _mending(method: Callable[Concatenate[Index, P], T]) -> Callable[Concatenate[Index, P], T]:
    """Has a method make a damaged index anew and do its work again."""

    @wraps(method)
    def wrapper(self: Index, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(self, *args, **kwargs)
        except sqlite3.ProgrammingError:
            raise
        except sqlite3.DatabaseError as error:
            self._mend(error)
        try:
            return method(self, *args, **kwargs)
        except sqlite3.DatabaseError as error:
            raise self._failure(error) from None

    return wrapper


class Index:
    """The index of one store. Several processes may use it at once."""

    def __init__(self, file: Path, items: Callable[[], Iterator[tuple[str, str, int]]] = lambda: iter(())) -> None:
        """`items` walks the store's files as (kind, key, size): what a new index begins with."""
        self.file, self._items = file, items
        make_folder(file.parent)
        self.connection: sqlite3.Connection
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            self._mend(error)

    def close(self) -> None:
        self.connection.close()

    def _open(self) -> None:
        self._identity = _inode(self.file)
        self.connection = sqlite3.connect(self.file, timeout=60, isolation_level=None, check_same_thread=False)
        self.connection.execute("pragma journal_mode = wal")
        self.connection.execute("pragma synchronous = normal")
        version = self.connection.execute("pragma user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise RunFailed(
                f"{self.file} was made by a newer runner (index {version})",
                hint="update runner, or delete the file: it is made anew from the files of the store",
            )
        if version < SCHEMA_VERSION:
            self._create()
        if self._identity is None:
            self._identity = _inode(self.file)

    def _create(self) -> None:
        """Makes the tables, in one transaction: another process may do the same."""
        with self.connection:
            self.connection.execute("begin immediate")
            if self.connection.execute("pragma user_version").fetchone()[0] < SCHEMA_VERSION:
                for statement in _CREATE.split(";"):
                    self.connection.execute(statement)
                self.connection.executemany("insert or replace into items values (?,?,?)", self._items())
                self.connection.execute(f"pragma user_version = {SCHEMA_VERSION}")
            self.connection.execute("commit")

    def _mend(self, error: sqlite3.DatabaseError) -> None:
        """Sets a damaged index aside and makes it anew. Raises `RunFailed` where it is not the index that is amiss."""
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if code not in _DAMAGE and not self.file.is_dir():
            raise self._failure(error) from None
        if hasattr(self, "connection"):
            self.connection.close()
        locks = self.file.parent / "locks"
        make_folder(locks)
        with FileLock(locks / "index.lock", timeout=60):
            if _inode(self.file) == self._identity:  # else another process has done it
                aside = self.file.with_name(ASIDE)
                remove(aside)
                if self._identity is not None:
                    rename(self.file, aside)
                for suffix in ("-wal", "-shm"):
                    remove(self.file.with_name(self.file.name + suffix))
                said.warning(
                    "the store's index %s was damaged (%s); it is made anew from the files of the store",
                    self.file,
                    error,
                )
            try:
                self._open()
            except sqlite3.DatabaseError as again:
                raise self._failure(again) from None

    def _failure(self, error: sqlite3.DatabaseError) -> RunFailed:
        """What SQLite says, in words that name the cause."""
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        free = shutil.disk_usage(self.file.parent).free
        if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and free < _FULL_BELOW):
            return RunFailed(
                f"the disk is full: {self.file} cannot be written",
                hint="free some space and apply again: the state is kept",
            )
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return RunFailed(f"{self.file} is locked by another process", hint="wait for it, or stop that process")
        reasons = {
            sqlite3.SQLITE_READONLY: "it is read-only",
            sqlite3.SQLITE_PERM: "no permission",
            sqlite3.SQLITE_IOERR: "the disk has an error, or has no such locks as SQLite needs",
            sqlite3.SQLITE_CANTOPEN: "it cannot be opened",
        }
        return RunFailed(
            f"{self.file} cannot be written: {reasons.get(code, str(error))}",
            hint="look at its folder's permissions and its disk, or set RUNNER_STORE to another folder",
        )

    @_mending
    def unchanged(self, folder: str, names: Collection[str]) -> dict[str, FileContent]:
        """What is known of those pictures and captions of a folder that have not changed since they were read."""
        rows = self.connection.execute(
            f"select inode, size, mtime_ns, ctime_ns, sum, name, {_CONTENT} from files"
            " where folder = ? and (width > 0 or text is not null or problem is not null)",
            (folder,),
        )
        found = {}
        for row in rows:
            name = row[5]
            if name in names:
                try:
                    stat = os.stat(f"{folder}/{name}")
                except OSError:
                    continue
                if row[:4] == (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns):
                    content = row[6:]
                    if row[4] == _sum(name, content):
                        found[name] = FileContent._make(content)
        return found

    @_mending
    def put_files(self, folder: str, files: Sequence[tuple[str, Stamp, FileContent]]) -> None:
        rows = [(folder, name, *stamp, *content, _sum(name, content)) for name, stamp, content in files]
        marks = ",".join("?" * (7 + len(FileContent._fields)))
        with self.connection:
            self.connection.execute("begin immediate")
            self.connection.executemany(
                f"insert or replace into files (folder, name, inode, size, mtime_ns, ctime_ns, {_CONTENT}, sum)"
                f" values ({marks})",
                rows,
            )
            self.connection.execute("commit")

    @_mending
    def known_digest(self, path: Path) -> str | None:
        """The file's digest where it is known without reading the file."""
        row = self.connection.execute(
            f"select inode, size, mtime_ns, ctime_ns, sum, name, {_CONTENT} from files where folder = ? and name = ?",
            (str(path.parent), path.name),
        ).fetchone()
        if row is not None and row[:4] == stamp(path.stat()) and row[4] == _sum(row[5], row[6:]):
            return str(row[6])
        return None

    def digest(self, path: Path) -> str:
        """The file's sha256, read only if it changed since the last time."""
        known = self.known_digest(path)
        if known is None:
            stat = path.stat()
            known = file_digest(path)
            self.put_files(str(path.parent), [(path.name, stamp(stat), FileContent(known))])
        return known

    @_mending
    def item_keys(self, kind: str) -> set[str]:
        return {row[0] for row in self.connection.execute("select key from items where kind = ?", (kind,))}

    @_mending
    def add_items(self, kind: str, keys: Sequence[tuple[str, int]]) -> None:
        rows = [(kind, key, size) for key, size in keys]
        self.connection.executemany("insert or replace into items values (?,?,?)", rows)

    @_mending
    def remove_item(self, kind: str, key: str) -> None:
        self.connection.execute("delete from items where kind = ? and key = ?", (kind, key))

    @_mending
    def measured(self, key: str) -> float | None:
        """A figure measured on this machine, a step's seconds for instance."""
        row = self.connection.execute("select value from measured where key = ?", (key,)).fetchone()
        return float(row[0]) if row and isinstance(row[0], (int, float)) else None

    @_mending
    def put_measured(self, key: str, value: float) -> None:
        self.connection.execute("insert or replace into measured values (?,?)", (key, value))


def _inode(file: Path) -> int | None:
    try:
        return file.stat().st_ino
    except OSError:
        return None
