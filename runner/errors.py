"""Errors that a user can cause, each with its exit code; and how one is drawn with its place in a file.

Whatever a user can cause is a `UserError`; anything else that reaches the command line's edge is a bug.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal


class Exit(IntEnum):
    """Exit codes of every command; part of the contract."""

    DONE = 0
    FAILED = 1
    CHANGES_PENDING = 2
    INVALID = 3
    LOCKED_DIFFERS = 4
    HELD = 5
    USAGE = 64
    TERMINATED = 75
    INTERRUPTED = 130


LONGEST_LINE = 1000
"""Characters of a line of a message; longer ones are cut."""
LONGEST_QUOTE = 160
"""Characters of a line of a file that are shown around what is marked in it."""
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """A text for a terminal: what would move its cursor, turn its direction or cannot be written at all is spelt out.

    A byte of a file name that is not UTF-8 is shown as `\\xe4`.
    """

    def spelt(match: re.Match[str]) -> str:
        code = ord(match.group())
        code = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

    return _UNSEEN.sub(spelt, text)


def cut(text: str, most: int = LONGEST_LINE) -> str:
    """Each line of a text, not longer than a message may be."""
    return "\n".join(
        line if len(line) <= most else f"{line[:most]}… ({len(line) - most:,} more characters)"
        for line in text.split("\n")
    )


@dataclass(frozen=True, kw_only=True)
class Place:
    """A line of a file with a part of it marked. `text` is the whole line; line 0 means the file as such."""

    file: str
    line: int = 0
    column: int = 1
    length: int = 1
    text: str = ""


@dataclass(frozen=True)
class Diagnostic:
    """One finding: what is wrong, where (a cross-field finding has two places), and what to do."""

    message: str
    places: tuple[Place, ...] = ()
    hint: str | None = None
    severity: Literal["error", "warning"] = "error"

    def render(self) -> str:
        """The finding as text: message, marked lines, hint."""
        lines = [f"{self.severity}: {cut(self.message)}"]
        width = max((len(str(place.line)) for place in self.places), default=0)
        for place in self.places:
            lines += _drawn(place, width)
        if self.hint:
            lines.append(f"hint: {cut(self.hint)}")
        return visible("\n".join(lines))

    def as_record(self) -> dict[str, object]:
        """The finding for `--json`."""
        return {
            "severity": self.severity,
            "message": cut(self.message),
            "hint": None if self.hint is None else cut(self.hint),
            "places": [{"file": p.file, "line": p.line, "column": p.column} for p in self.places],
        }


def _drawn(place: Place, width: int) -> list[str]:
    if place.line == 0:
        return [f"{' ' * width}┌ {place.file}"]
    text, column = place.text, place.column
    if len(text) > LONGEST_QUOTE:
        start = max(0, min(column - 1 - LONGEST_QUOTE // 4, len(text) - LONGEST_QUOTE))
        before, after = "…" if start else "", "…" if start + LONGEST_QUOTE < len(text) else ""
        text, column = f"{before}{text[start : start + LONGEST_QUOTE]}{after}", column - start + len(before)
    marked = max(1, min(place.length, len(text) - column + 1))
    # What is spelt out is longer than it was; the mark stands under it all the same.
    offset, length = len(visible(text[: column - 1])), len(visible(text[column - 1 : column - 1 + marked])) or 1
    return [
        f"{' ' * width}┌ {place.file}:{place.line}:{place.column}",
        f"{place.line:>{width}}│ {text}",
        f"{' ' * width}│ {' ' * offset}{'^' * length}",
    ]


class UserError(Exception):
    """Something that the user can mend; ends the program with `code`."""

    code = Exit.FAILED

    def __init__(self, message: str, *, hint: str | None = None, places: Sequence[Place] = ()) -> None:
        super().__init__(message)
        self.diagnostics: tuple[Diagnostic, ...] = (Diagnostic(message, tuple(places), hint),)


class InvalidConfig(UserError):
    """The configuration, the dataset or a file is not valid: all findings at once, sorted by line."""

    code = Exit.INVALID

    def __init__(self, diagnostics: Sequence[Diagnostic]) -> None:
        super().__init__(diagnostics[0].message if diagnostics else "invalid configuration")
        self.diagnostics = tuple(sort_diagnostics(diagnostics))


class Invalid(UserError):
    """Invalid input that has no place in run.toml."""

    code = Exit.INVALID


class LockedDiffers(UserError):
    """`--locked`, and something differs from the lock."""

    code = Exit.LOCKED_DIFFERS


class Held(UserError):
    """Another process holds the run."""

    code = Exit.HELD


class UsageError(UserError):
    """The command's arguments are wrong, or it needs --yes."""

    code = Exit.USAGE


class RunFailed(UserError):
    """The run itself failed: a loss that is not finite, no memory, a full disk."""

    code = Exit.FAILED


class Stopped(UserError):
    """Stopped by a signal, with the state saved."""

    def __init__(self, message: str, code: Exit) -> None:
        super().__init__(message)
        self.code = code


def sort_diagnostics(diagnostics: Sequence[Diagnostic]) -> list[Diagnostic]:
    """By file place; findings without a place come last."""

    def order(diagnostic: Diagnostic) -> tuple[int, int]:
        if not diagnostic.places:
            return (1 << 30, 0)
        return (diagnostic.places[0].line, diagnostic.places[0].column)

    return sorted(diagnostics, key=order)
