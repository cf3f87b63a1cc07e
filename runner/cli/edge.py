"""What ends a command without being a `UserError`: the system refused a call, or a bug."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import time
import traceback
from contextlib import suppress

from runner import __version__
from runner.atomic import CannotWrite
from runner.errors import Exit, RunFailed

MOST_MESSAGE = 500
MOST_REPORT = 200_000
MOST_FRAMES = 60
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_IN_THE_WAY = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY)


def refused(error: OSError) -> RunFailed | None:
    """What a failed call of the system says, with the path and the reason; None where it was no such call."""
    if error.errno is None:
        return None
    path = str(error.filename) if error.filename is not None else "a file"
    path = cut(path, MOST_MESSAGE)
    if error.errno in _FULL:
        what = "the disk is full" if error.errno == errno.ENOSPC else "the disk quota is used up"
        return RunFailed(f"{what}: {path} cannot be written", hint="free some space and apply again: the state is kept")
    can = "written" if isinstance(error, CannotWrite) else "read or written"
    hint = "apply again once that is mended: the state is kept"
    if error.errno in _IN_THE_WAY and isinstance(error, CannotWrite):
        hint = "something else is in its place: move or delete it"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        hint = "allow more open files (ulimit -n) and apply again: the state is kept"
    return RunFailed(f"{path} cannot be {can}: {error.strerror}", hint=hint)


def report_bug(error: BaseException) -> int:
    """A traceback is a bug: it goes to a file, its name to the user. Never raises, and never writes without bound."""
    _say(f"error: this is a bug in runner: {type(error).__name__}: {_message(error)}")
    head = f"runner {__version__}, {sys.version}\n{cut(' '.join(sys.argv), MOST_MESSAGE)}\n\n"
    text = cut(head + _trace(error), MOST_REPORT)
    try:
        name = f"runner-bug-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
        path = os.path.join(tempfile.gettempdir(), name)
        with open(path, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
    except OSError as problem:
        _say(f"hint: please report it with these lines; no file of it could be written: {problem.strerror}")
        _say(text[-2000:])
    else:
        _say(f"hint: please report it with the file {path}")
    return Exit.FAILED


def cut(text: str, most: int) -> str:
    """A text's beginning and end where it is too long."""
    return text if len(text) <= most else f"{text[: most * 3 // 4]}… [{len(text):,} characters] …{text[-most // 5 :]}"


def _message(error: BaseException) -> str:
    try:
        text = cut(str(error), MOST_MESSAGE)
        return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    except Exception as worse:  # noqa: BLE001 - whatever an exception's own text raises
        return f"(its text raises {type(worse).__name__})"


def _trace(error: BaseException) -> str:
    """The traceback of an exception and of those that led to it, without the texts' excess."""
    parts: list[str] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen and len(seen) < 6:
        seen.add(id(current))
        frames = traceback.extract_tb(current.__traceback__)
        kept = frames if len(frames) <= MOST_FRAMES else [*frames[: MOST_FRAMES // 2], *frames[-MOST_FRAMES // 2 :]]
        lines = "".join(cut(line, 2 * MOST_MESSAGE) for line in traceback.format_list(kept))
        parts.append(f"{lines}{type(current).__module__}.{type(current).__qualname__}: {_message(current)}\n")
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return "\nwhich led to:\n\n".join(reversed(parts))


def _say(text: str) -> None:
    """To stderr, which may be gone too."""
    with suppress(OSError, ValueError):
        sys.stderr.write(text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n")
        sys.stderr.flush()
