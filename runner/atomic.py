"""Files and folders that are there whole or not at all: a temporary name, fsync, one rename.

All that is written goes through here, so that a failing call of the system becomes one kind of error: `CannotWrite`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from runner.files import kind_of

TEMPORARY = ".tmp-"
_NAMED = re.compile(r"\.tmp-(?:([0-9a-f]{8})-)?(\d+)-(.+)", re.DOTALL)
"""Machine, process, and what it becomes."""
_LONGEST = 180
"""Bytes of a name that its temporary name still shows: a file system takes 255 in all."""
_HOST = hashlib.sha256(platform.node().encode("utf-8", "surrogateescape")).hexdigest()[:8]
_LONG_AGO = 24 * 3600.0
"""Seconds after which a temporary file of a process that cannot be looked up is taken for a leftover."""


class CannotWrite(OSError):
    """A file or folder could not be written: errno, strerror and filename, which is that of the whole file."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around calls that write `path`: what the system refuses becomes `CannotWrite`, with the path that it is about."""
    try:
        yield
    except CannotWrite:
        raise
    except OSError as error:
        if error.errno is None:  # a library's own: no call of the system
            raise
        filename = str(error.filename2 or error.filename or path)
        named = _NAMED.search(filename)
        raise CannotWrite(error.errno, error.strerror, str(path) if named else filename) from error


def temporary_for(path: Path) -> Path:
    """The name under which this process writes what becomes `path`."""
    return path.with_name(f"{TEMPORARY}{_HOST}-{os.getpid()}-{_label(path.name)}")


def _label(name: str) -> str:
    encoded = os.fsencode(name)
    return name if len(encoded) <= _LONGEST else hashlib.sha256(encoded).hexdigest()


@contextmanager
def new_file(path: Path, synced: bool = True) -> Iterator[Path]:
    """A file that appears under its name only when the block ends well, on the disk; its folder is made if missing.

    Without `synced` a loss of power may leave it torn: for what carries a checksum and can be made again.
    """
    make_folder(path.parent)
    refuse_devices(path)
    temporary = temporary_for(path)
    try:
        with _block(temporary, path):
            yield temporary
        with writing(path):
            if synced:
                _fsync(str(temporary), os.O_RDWR)
            os.replace(temporary, path)
    except BaseException:
        _drop(temporary)
        raise
    if synced:
        fsync_folder(path.parent)


def refuse_devices(path: Path) -> None:
    """A rename would put a file in the place of /dev/null, and opening a named pipe would wait for its reader."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode)):
        raise CannotWrite(errno.EEXIST, f"it is {kind_of(mode)}, not a file", str(path))


@contextmanager
def _block(temporary: Path, path: Path) -> Iterator[None]:
    """Around a caller's own work on a temporary file or folder: it may also read others, whose errors stay their own."""
    try:
        yield
    except OSError as error:
        about = error.filename2 or error.filename
        if error.errno is None or (about is not None and not str(about).startswith(str(temporary))):
            raise
        raise CannotWrite(error.errno, error.strerror, str(path)) from error


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
    make_folder(path.parent)
    temporary = temporary_for(path)
    _drop(temporary)
    with writing(path):
        temporary.mkdir()
    try:
        with _block(temporary, path):
            yield temporary
        with writing(path):
            fsync_tree(temporary)
            os.rename(temporary, path)
    except BaseException:
        _drop(temporary)
        raise
    fsync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it; one that is there is well."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def rename(source: Path, destination: Path) -> None:
    """Renames within a disk, and brings both folders to it."""
    make_folder(destination.parent)
    with writing(destination):
        os.rename(source, destination)
    fsync_folder(destination.parent)
    fsync_folder(source.parent)


def remove(path: Path) -> None:
    """Deletes a file, a link or a folder with all that is in it; nothing there is well."""
    with writing(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _drop(path: Path) -> None:
    """Deletes a temporary file or folder where that can be done; the next sweep finds it else."""
    with suppress(OSError):
        remove(path)


def fsync_tree(folder: Path) -> None:
    """Brings every file and folder under `folder` to the disk."""
    for directory, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(directory, name)
            if not os.path.islink(path):
                _fsync(path, os.O_RDONLY)
        _fsync_folder(directory)


def fsync_folder(folder: Path) -> None:
    """Brings a folder's entries to the disk."""
    with writing(folder):
        _fsync_folder(str(folder))


def _fsync_folder(folder: str) -> None:
    """Windows has no such call and needs none."""
    if os.name == "posix":
        _fsync(folder, os.O_RDONLY)


def _fsync(path: str, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_file(source: Path, destination: Path) -> None:
    """Copies a file atomically without reading it whole into memory; what a kill left of an earlier copy goes."""
    sweep(destination.parent, destination.name)
    with new_file(destination) as temporary:
        shutil.copyfile(source, temporary)


def copy_tree(source: Path, destination: Path, skipped: Sequence[str] = ()) -> None:
    """Copies a folder, each file atomically, without files and folders whose names match `skipped`."""
    _each_file(source, destination, copy_file, skipped)


def link_or_copy(source: Path, place: Path) -> None:
    """Makes `place` another name of a file: a hard link, else a copy."""
    if place.exists() and not place.is_symlink() and os.path.samefile(source, place):
        return
    make_folder(place.parent)
    temporary = temporary_for(place)
    _drop(temporary)
    try:
        os.link(source, temporary)
        os.replace(temporary, place)
    except OSError:
        _drop(temporary)  # the copy would be made into its own source
        copy_file(source, place)


def link_or_copy_tree(source: Path, destination: Path) -> None:
    """Hard links the files of a folder into a new one, copying where links are not allowed."""
    _each_file(source, destination, link_or_copy)


def _each_file(
    source: Path, destination: Path, place: Callable[[Path, Path], None], skipped: Sequence[str] = ()
) -> None:
    """Places every file under `source` at the same path under `destination`, whose folders are made."""

    def taken(names: list[str]) -> list[str]:
        return [name for name in names if not any(fnmatch(name, pattern) for pattern in skipped)]

    for directory, folders, names in os.walk(source):
        folders[:] = taken(folders)
        target = destination / os.path.relpath(directory, source)
        make_folder(target)
        for name in taken(names):
            place(Path(directory, name), target / name)


def sweep(folder: Path, name: str = "") -> None:
    """Deletes the temporary files and folders that a killed process left in `folder`; with `name`, those of it alone."""
    if not folder.is_dir():
        return
    with writing(folder):
        entries = [Path(entry.path) for entry in os.scandir(folder) if entry.name.startswith(TEMPORARY)]
    for entry in entries:
        if _is_leftover(entry, name):
            remove(entry)


def sweep_tree(folder: Path) -> None:
    """The same in a folder of the program's own and all that is in it."""
    for directory, folders, names in os.walk(folder):
        if any(name.startswith(TEMPORARY) for name in (*folders, *names)):
            sweep(Path(directory))
        folders[:] = [name for name in folders if not name.startswith(TEMPORARY)]


def _is_leftover(entry: Path, name: str) -> bool:
    """Whether nobody writes it any more. Own files of this process are none that it still writes: it sweeps before."""
    named = _NAMED.fullmatch(entry.name)
    if name and (named is None or named[3] != _label(name)):
        return False
    if named is not None and named[1] in (None, _HOST):
        import psutil

        process = int(named[2])
        return process == os.getpid() or not psutil.pid_exists(process)
    try:
        return time.time() - entry.lstat().st_mtime > _LONG_AGO
    except OSError:
        return False
