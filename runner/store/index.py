"""An SQLite index of what the store holds and of the outside files that were read.

`files` remembers a file's digest by (inode, size, mtime_ns, ctime_ns), with what reading it told: a picture's size or
why it cannot be decoded, a caption's text. `items` lists the encoded items, so that planning asks the disk nothing.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from runner.errors import RunFailed

SCHEMA_VERSION = 1
_CREATE = """
create table if not exists files (
    folder text not null, name text not null, inode integer, size integer, mtime_ns integer, ctime_ns integer,
    digest text, width integer, height integer, text text, problem text, primary key (folder, name)) without rowid;
create table if not exists items (kind text not null, key text not null, bytes integer, primary key (kind, key)) without rowid;
create table if not exists measured (key text primary key, value real) without rowid;
"""


class FileContent(NamedTuple):
    """What reading a file told. `problem` says why a picture or a caption cannot be used."""

    digest: str
    width: int = 0
    height: int = 0
    text: str | None = None
    problem: str | None = None


Stamp = tuple[int, int, int, int]
"""What tells that a file has not changed: (inode, size, mtime_ns, ctime_ns)."""


def stamp(stat: os.stat_result) -> Stamp:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


class Index:
    """The index of one store. Several processes may use it at once."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.connection = sqlite3.connect(file, timeout=60, isolation_level=None, check_same_thread=False)
        try:
            self.connection.execute("pragma journal_mode = wal")
            self.connection.execute("pragma synchronous = normal")
            version = self.connection.execute("pragma user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise RunFailed(f"{file} was made by a newer runner (index {version})", hint="update runner")
            if version < SCHEMA_VERSION:
                self.connection.executescript(_CREATE)
                self.connection.execute(f"pragma user_version = {SCHEMA_VERSION}")
        except sqlite3.DatabaseError as error:
            raise RunFailed(
                f"the store's index {file} cannot be read: {error}",
                hint="delete it: it is made again from the files in the store",
            ) from None

    def close(self) -> None:
        self.connection.close()

    def unchanged(self, folder: str, names: Collection[str]) -> dict[str, FileContent]:
        """What is known of those pictures and captions of a folder that have not changed since they were read."""
        rows = self.connection.execute(
            "select name, digest, width, height, text, problem, inode, size, mtime_ns, ctime_ns from files"
            " where folder = ? and (width > 0 or text is not null or problem is not null)",
            (folder,),
        )
        found = {}
        for row in rows:
            name = row[0]
            if name in names:
                try:
                    stat = os.stat(f"{folder}/{name}")
                except OSError:
                    continue
                if row[6:] == (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns):
                    found[name] = FileContent._make(row[1:6])
        return found

    def put_files(self, folder: str, files: Iterable[tuple[str, Stamp, FileContent]]) -> None:
        rows = [
            (folder, name, *stamp, content.digest, content.width, content.height, content.text, content.problem)
            for name, stamp, content in files
        ]
        with self.connection:
            self.connection.execute("begin immediate")
            self.connection.executemany("insert or replace into files values (?,?,?,?,?,?,?,?,?,?,?)", rows)
            self.connection.execute("commit")

    def known_digest(self, path: Path) -> str | None:
        """The file's digest where it is known without reading the file."""
        row = self.connection.execute(
            "select inode, size, mtime_ns, ctime_ns, digest from files where folder = ? and name = ?",
            (str(path.parent), path.name),
        ).fetchone()
        if row is not None and row[:4] == stamp(path.stat()):
            return str(row[4])
        return None

    def digest(self, path: Path) -> str:
        """The file's sha256, read only if it changed since the last time."""
        known = self.known_digest(path)
        if known is None:
            stat = path.stat()
            with open(path, "rb") as stream:
                known = hashlib.file_digest(stream, "sha256").hexdigest()
            self.put_files(str(path.parent), [(path.name, stamp(stat), FileContent(known))])
        return known

    def item_keys(self, kind: str) -> set[str]:
        return {row[0] for row in self.connection.execute("select key from items where kind = ?", (kind,))}

    def add_items(self, kind: str, keys: Iterable[tuple[str, int]]) -> None:
        rows = [(kind, key, size) for key, size in keys]
        self.connection.executemany("insert or replace into items values (?,?,?)", rows)

    def remove_item(self, kind: str, key: str) -> None:
        self.connection.execute("delete from items where kind = ? and key = ?", (kind, key))

    def measured(self, key: str) -> float | None:
        """A figure measured on this machine, a step's seconds for instance."""
        row = self.connection.execute("select value from measured where key = ?", (key,)).fetchone()
        return float(row[0]) if row else None

    def put_measured(self, key: str, value: float) -> None:
        self.connection.execute("insert or replace into measured values (?,?)", (key, value))
