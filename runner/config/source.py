"""One run.toml with what was set over it: the document, and the place of each of its keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any

from runner.config.locate import Path, Positions, Span, locate
from runner.errors import Diagnostic, Place


@dataclass(kw_only=True)
class Source:
    """The parsed document and its text; `overrides` are the paths that --set gave, with what was typed."""

    file: FilePath
    text: str
    document: dict[str, Any]
    overrides: dict[Path, str] = field(default_factory=dict)
    shown_name: str = ""

    def __post_init__(self) -> None:
        self.shown_name = self.shown_name or self.file.name

    @cached_property
    def positions(self) -> Positions:
        return locate(self.text)

    @cached_property
    def lines(self) -> list[str]:
        return self.text.replace("\r\n", "\n").split("\n")

    def value(self, path: Path) -> Any:
        """The document's value at a path; None where there is none."""
        node: Any = self.document
        for part in path:
            if isinstance(node, dict) and isinstance(part, str):
                node = node.get(part)
            elif isinstance(node, list) and isinstance(part, int) and part < len(node):
                node = node[part]
            else:
                return None
        return node

    def key_places(self, path: Path) -> tuple[Place, ...]:
        return self._override_place(path) or self._places(self.positions.of_key(path))

    def value_places(self, path: Path) -> tuple[Place, ...]:
        return self._override_place(path) or self._places(self.positions.of_value(path))

    def header_places(self, path: Path) -> tuple[Place, ...]:
        """The header of a section, else the file."""
        found = self.positions.headers.get(path) or self.positions.keys.get(path) or self.positions.values.get(path)
        return self._places(found)

    def file_place(self) -> tuple[Place, ...]:
        return (Place(file=self.shown_name),)

    def _override_place(self, path: Path) -> tuple[Place, ...]:
        for end in range(len(path), 0, -1):
            typed = self.overrides.get(path[:end])
            if typed is not None:
                return (Place(file=f"--set {typed}"),)
        return ()

    def _places(self, span: Span | None) -> tuple[Place, ...]:
        if span is None:
            return self.file_place()
        return (
            Place(
                file=self.shown_name,
                line=span.line,
                column=span.column,
                length=span.length,
                text=self.lines[span.line - 1],
            ),
        )


def conflict(source: Source, message: str, paths: list[Path], hint: str) -> Diagnostic:
    """An error that shows every place involved."""
    return Diagnostic(message, tuple(place for path in paths for place in source.key_places(path)), hint)
