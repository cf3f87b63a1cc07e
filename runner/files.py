"""Reads files that a user or a dataset names: regular ones only, of a bounded size; and guards what parses them.

A named pipe, a device or a socket would be waited for or read for ever. Whatever is wrong is an `OSError` whose `strerror`
says it in words, so that one `except OSError` says all.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import itertools
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from runner.errors import Invalid

MOST_TEXT_BYTES = 2**19
"""Of a file that people write by hand: run.toml, prompts, a dataset's settings."""
MOST_JSON_BYTES = 64 * 2**20
"""Of a file that programs write: plan.json, a tokenizer's vocabulary."""
_MOST_NAMES = 10_000
"""Of a folder, in which a name like a missing one is looked for."""
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def open_regular(file: Path | str, most: int | None = None) -> BufferedReader:
    """Opens a regular file of at most `most` bytes for reading. Raises `OSError` for any other, and never waits."""
    problem = name_problem(str(file))
    if problem is not None:
        raise OSError(errno.EINVAL, problem, str(file))
    # Opening a named pipe would wait for its writer.
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            code = errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EINVAL
            raise OSError(code, f"it is {kind_of(found.st_mode)}, not a file", str(file))
        if most is not None and found.st_size > most:
            raise OSError(errno.EFBIG, f"it has {found.st_size:,} bytes; at most {most:,} are read", str(file))
        return os.fdopen(descriptor, "rb")
    except OSError:
        os.close(descriptor)
        raise


def read_bytes(file: Path | str, most: int) -> bytes:
    """A regular file's content. Raises `OSError`."""
    with open_regular(file, most) as stream:
        content = stream.read(most + 1)
    if len(content) > most:  # it grew, or says another size than it has
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(file))
    return content


def file_digest(file: Path | str) -> str:
    """A regular file's sha256. Raises `OSError`."""
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_problem(file: Path | str) -> str | None:
    """Why a name is not that of a regular file; None where it is one."""
    problem = name_problem(str(file))
    if problem is not None:
        return f"{shown_path(file)} is no file: {problem}"
    try:
        mode = os.stat(file).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return f"there is no file {file}"
    except OSError as error:
        return f"{shown_path(file)} cannot be read: {error.strerror}"
    return None if stat.S_ISREG(mode) else f"{file} is {kind_of(mode)}, not a file"


def near_name(path: Path) -> str | None:
    """For a path that is not there: what its folder holds of a name like it, or the first folder on the way that is missing."""
    if name_problem(str(path)) is not None or os.path.lexists(path):
        return None
    missing, there = path.absolute(), path.absolute().parent
    while not there.is_dir() and there.parent != there:
        missing, there = there, there.parent
    try:
        with os.scandir(there) as entries:
            names = sorted(entry.name for entry in itertools.islice(entries, _MOST_NAMES) if entry.name.isprintable())
    except OSError:
        return None
    lowered = {name.lower(): name for name in reversed(names)}
    stems = {Path(name).stem.lower(): name for name in reversed(names)}  # the ending alone makes no names alike
    stem = missing.stem.lower()
    near = difflib.get_close_matches(stem, stems, 1, 0.6)
    found = lowered.get(missing.name.lower()) or stems.get(stem) or (stems[near[0]] if near else None)
    if found is not None:
        return f"did you mean {there / found}?"
    return f"there is no folder {missing}" if missing != path.absolute() else None


def name_problem(name: str) -> str | None:
    """Why a text cannot be the name of any file; None where it can."""
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        return "its name holds half a character (a lone surrogate)"
    if b"\0" in encoded:
        return "its name holds a NUL character"
    if len(encoded) > 4095 or any(len(part) > 255 for part in encoded.split(os.sep.encode())):
        return "its name is too long: 255 bytes a part and 4,095 in all are the most"
    return None


def shown_path(file: Path | str) -> str:
    """A path for a message, not longer than a line or two."""
    text = str(file)
    return text if len(text) <= 200 else f"{text[:120]}…{text[-60:]}"


def kind_of(mode: int) -> str:
    """What is no regular file, in words."""
    return next((words for test, words in _KINDS if test(mode)), "of an unknown kind")


@contextmanager
def parsing(problem: Callable[[str], Exception]) -> Iterator[None]:
    """Around the parsing of a text from outside, and nothing else: whatever that raises becomes `problem(reason)`."""
    try:
        yield
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        MemoryError,
        EOFError,
    ) as error:
        raise problem(reason(error)) from None


def reason(error: Exception) -> str:
    """What parsing raised, in words."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, UnicodeEncodeError):
        return "it holds half a character (a lone surrogate)"
    if isinstance(error, UnicodeError):
        at = f" (byte {error.start})" if isinstance(error, UnicodeDecodeError) else ""
        return f"it is not UTF-8{at}"
    text = str(error)
    if "integer string conversion" in text:
        return "a number of it has more than 4,300 digits"
    text = text or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"


def resolve_path(name: str, folder: Path) -> Path:
    """A path as run.toml means it: `~` is the home folder, relative ones are relative to run.toml's folder. Raises
    `Invalid` where no file can be called so."""
    path = os.path.normpath(folder / os.path.expanduser(name))
    problem = name_problem(path)
    if problem is not None:
        raise Invalid(f"{shown_path(name)} is no file: {problem}")
    return Path(path)
