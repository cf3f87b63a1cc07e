"""Maps each key path of a TOML text to its line and column.

tomli gives positions for syntax errors only, and no kept library gives them for values. This scanner runs on text that
tomli has accepted, so it can be short: it needs no validation of its own, and the tests compare its paths with tomli's.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass, field

import tomli

Path = tuple[str | int, ...]

_BARE_VALUE = re.compile(r"\d{4}-\d\d-\d\d \d[^,\]}\s#]*|[^,\]}\s#]+")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_BLANKS = re.compile(r"[ \t]*")
_BLANKS_AND_LINES = re.compile(r"(?:[ \t\n]++|#[^\n]*+)*+")
_STRINGS = {
    '"': re.compile(r'"(?:[^"\\]++|\\.)*+"'),
    "'": re.compile(r"'[^']*+'"),
    '"""': re.compile(r'"""(?:[^"\\]++|\\.|"(?!""))*+"{3,5}', re.DOTALL),
    "'''": re.compile(r"'''(?:[^']++|'(?!''))*+'{3,5}"),
}


@dataclass(frozen=True, order=True)
class Span:
    """A place in a file: 1-based line and column, and how many characters of that line it covers."""

    line: int
    column: int
    length: int = 1


@dataclass
class Positions:
    """Where keys, values and table headers stand. A table that is written in several places has its first."""

    keys: dict[Path, Span] = field(default_factory=dict)
    values: dict[Path, Span] = field(default_factory=dict)
    headers: dict[Path, Span] = field(default_factory=dict)

    def of_key(self, path: Path) -> Span | None:
        """The key's own place, else that of the nearest enclosing table."""
        for end in range(len(path), 0, -1):
            found = self.keys.get(path[:end]) or self.headers.get(path[:end]) or self.values.get(path[:end])
            if found:
                return found
        return None

    def of_value(self, path: Path) -> Span | None:
        """The value's place, else that of its key or table."""
        return self.values.get(path) or self.of_key(path)


def locate(text: str) -> Positions:
    """Scans TOML that tomli accepts."""
    return _Scanner(text.replace("\r\n", "\n")).scan()


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.line_starts = [0] + [match.end() for match in re.finditer("\n", text)]
        self.positions = Positions()
        self.array_lengths: dict[Path, int] = {}

    def scan(self) -> Positions:
        table: Path = ()
        while self._skip(newlines=True):
            if self.text[self.at] == "[":
                table = self._header()
            else:
                self._pair(table)
        return self.positions

    def _header(self) -> Path:
        start = self.at
        is_array = self.text.startswith("[[", self.at)
        self.at += 2 if is_array else 1
        parts = [part for part, _, _ in self._key()]
        self.at = self.text.index("]", self.at) + (2 if is_array else 1)
        path: Path = ()
        for index, part in enumerate(parts):
            path += (part,)
            is_last = index == len(parts) - 1
            if is_last and is_array:
                self.array_lengths[path] = self.array_lengths.get(path, 0) + 1
            if path in self.array_lengths:
                path += (self.array_lengths[path] - 1,)
            if not is_last:
                self.positions.headers.setdefault(path, self._span(start, len(self.text)))
        self.positions.headers.setdefault(path, self._span(start, self.at))
        if is_array:
            self.positions.headers.setdefault(path[:-1], self._span(start, self.at))
        return path

    def _pair(self, table: Path) -> None:
        path = table
        for part, start, end in self._key():
            path += (part,)
            self.positions.keys.setdefault(path, self._span(start, end))
        self._skip()
        self.at += 1  # the equals sign
        self._skip()
        self._value(path)

    def _key(self) -> list[tuple[str, int, int]]:
        parts = []
        while True:
            self._skip()
            start = self.at
            if self.text[self.at] in "\"'":
                part = str(tomli.loads(f"k = {self._string()}")["k"])
            else:
                match = _BARE_KEY.match(self.text, self.at)
                assert match, f"no key at offset {self.at}"
                part, self.at = match.group(), match.end()
            parts.append((part, start, self.at))
            self._skip()
            if self.text[self.at] != ".":
                return parts
            self.at += 1

    def _value(self, path: Path) -> None:
        start = self.at
        opening = self.text[self.at]
        if opening == "[":
            self._items(path, "]")
        elif opening == "{":
            self._items(path, "}")
        elif opening in "\"'":
            self._string()
        else:
            match = _BARE_VALUE.match(self.text, self.at)
            assert match, f"no value at offset {self.at}"
            self.at = match.end()
        self.positions.values[path] = self._span(start, self.at)

    def _items(self, path: Path, closing: str) -> None:
        self.at += 1
        index = 0
        while self._skip(newlines=True) and self.text[self.at] != closing:
            if self.text[self.at] == ",":
                self.at += 1
            elif closing == "}":
                self._pair(path)
            else:
                self._value((*path, index))
                index += 1
        self.at += 1

    def _string(self) -> str:
        """The string that begins here, as it is written."""
        quote = self.text[self.at]
        mark = quote * 3 if self.text.startswith(quote * 3, self.at) else quote
        found = _STRINGS[mark].match(self.text, self.at)
        assert found, f"no end of the string at offset {self.at}"
        self.at = found.end()
        return found.group()

    def _skip(self, newlines: bool = False) -> bool:
        """Passes over blanks (and line ends and comments); False at the end of the text."""
        blanks = _BLANKS_AND_LINES if newlines else _BLANKS
        found = blanks.match(self.text, self.at)
        self.at = found.end() if found else self.at
        return self.at < len(self.text)

    def _span(self, start: int, end: int) -> Span:
        low = bisect_right(self.line_starts, start) - 1
        line_end = self.line_starts[low + 1] - 1 if low + 1 < len(self.line_starts) else len(self.text)
        return Span(low + 1, start - self.line_starts[low] + 1, max(1, min(end, line_end) - start))
