"""Files and folders that are there whole or not at all: a temporary name, fsync, one rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"
"""Names that begin so are leftovers of a process that died; whoever finds one under its own lock may delete it."""


def _temporary_for(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file that appears under its name only when the block ends well, on the disk; its folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_for(path)
    try:
        yield temporary
        _fsync(str(temporary), os.O_RDWR)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically; its folder is made where it is missing."""
    with new_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name only when the block ends well, with everything in it on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_for(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        fsync_tree(temporary)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(path.parent)


def fsync_tree(folder: Path) -> None:
    """Brings every file and folder under `folder` to the disk."""
    for directory, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(directory, name)
            if not os.path.islink(path):
                _fsync(path, os.O_RDONLY)
        fsync_folder(Path(directory))


def fsync_folder(folder: Path) -> None:
    """Brings a folder's entries to the disk; Windows has no such call and needs none."""
    if os.name == "posix":
        _fsync(str(folder), os.O_RDONLY)


def _fsync(path: str, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_file(source: Path, destination: Path) -> None:
    """Copies a file atomically without reading it whole into memory."""
    with new_file(destination) as temporary:
        shutil.copyfile(source, temporary)


def link_or_copy_tree(source: Path, destination: Path) -> None:
    """Hard links the files of a folder into a new one, copying where links are not allowed."""
    for directory, _, names in os.walk(source):
        target = destination / os.path.relpath(directory, source)
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            try:
                os.link(os.path.join(directory, name), target / name)
            except OSError:
                shutil.copyfile(os.path.join(directory, name), target / name)


def sweep(folder: Path, name: str = "") -> None:
    """Deletes the temporary files and folders that a killed process left in `folder`; with `name`, those of it alone."""
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        if entry.name.startswith(TEMPORARY) and entry.name.endswith(name and f"-{name}"):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
