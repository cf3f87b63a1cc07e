"""Lists of pictures with captions, as sd-scripts and musubi-tuner read them: JSON `{path: {caption, tags}}`, or JSONL lines
`{image_path, caption, tags}`. Pictures must lie in the list's folder or below it; torch-free."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner.dataset.probe import IMAGE_EXTENSIONS

METADATA_SUFFIXES = (".json", ".jsonl")
MAX_BYTES = 500_000_000


class MetadataProblem(Exception):
    """A list that cannot be used."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


def read_metadata(file: Path, folder: Path) -> dict[str, str]:
    """Path of each picture below `folder` → its caption, empty where the list has none. Raises `MetadataProblem`."""
    found: dict[str, str] = {}
    for place, name, entry in _entries(file):
        if not isinstance(name, str) or not isinstance(entry, dict):
            raise MetadataProblem(f"{file.name}, {place}: no picture with a table of caption and tags")
        parts = [entry.get("caption"), entry.get("tags")]
        if any(part is not None and not isinstance(part, str) for part in parts):
            raise MetadataProblem(f"{file.name}, {place}: caption and tags must be text")
        found[_below(file, place, name, folder)] = ", ".join(part for part in parts if part)
    if not found:
        raise MetadataProblem(f"{file} lists no pictures")
    return found


def _entries(file: Path) -> Iterator[tuple[str, Any, Any]]:
    """(place for messages, path, entry)."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise MetadataProblem(f"{file} has {file.stat().st_size:,} bytes")
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MetadataProblem(f"{file} cannot be read: {error}") from None
    if file.suffix.lower() == ".json":
        content = _parsed(file, "the file", text)
        if not isinstance(content, dict):
            raise MetadataProblem(f"{file.name} is no table of pictures")
        yield from ((f"{name!r}", name, entry) for name, entry in content.items())
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            entry = _parsed(file, f"line {number}", line)
            yield f"line {number}", entry.get("image_path") if isinstance(entry, dict) else None, entry


def _parsed(file: Path, place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise MetadataProblem(f"{file.name}, {place}: no JSON ({error})") from None


def _below(file: Path, place: str, name: str, folder: Path) -> str:
    """The path below the folder; an ending that the list leaves out is found."""
    whole = os.path.normpath(os.path.join(folder, name))
    relative = os.path.relpath(whole, folder)
    if relative.startswith(os.pardir) or os.path.isabs(relative):
        raise MetadataProblem(
            f"{file.name}, {place}: {name} lies outside of {folder}", "put the list into the folder of its pictures"
        )
    if os.path.splitext(whole)[1].lower() in IMAGE_EXTENSIONS:
        return relative
    ending = next((ending for ending in sorted(IMAGE_EXTENSIONS) if os.path.exists(whole + ending)), None)
    if ending is None:
        raise MetadataProblem(f"{file.name}, {place}: there is no picture {name}")
    return relative + ending
