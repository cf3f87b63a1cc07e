"""Lists of pictures or videos with captions, as sd-scripts and musubi-tuner read them: JSON `{path: {caption, tags}}`, or
JSONL lines `{image_path, caption, tags, control_path, control_path_0 …}` and `{video_path, caption}`, where a video may be a
folder of pictures. Files must lie in the list's folder or below it; torch-free."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from runner.dataset.media import ENDINGS

METADATA_SUFFIXES = (".json", ".jsonl")
MAX_BYTES = 500_000_000


class MetadataProblem(Exception):
    """A list that cannot be used."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class Listed(NamedTuple):
    """What a list says of a picture or video: its caption (empty where there is none) and its control images."""

    caption: str
    controls: tuple[str, ...] = ()


def read_metadata(file: Path, folder: Path, kind: str = "image") -> dict[str, Listed]:
    """Path of each picture or video below `folder` → what the list says of it. Raises `MetadataProblem`."""
    noun = "video" if kind == "video" else "picture"
    found: dict[str, Listed] = {}
    for place, name, entry in _entries(file, f"{kind}_path"):
        if not isinstance(name, str) or not isinstance(entry, dict):
            raise MetadataProblem(f"{file.name}, {place}: no {noun} with a table of caption and tags")
        parts = [entry.get("caption"), entry.get("tags")]
        if any(part is not None and not isinstance(part, str) for part in parts):
            raise MetadataProblem(f"{file.name}, {place}: caption and tags must be text")
        controls = _controls(file, place, entry, folder)
        found[_below(file, place, name, folder, kind)] = Listed(", ".join(part for part in parts if part), controls)
    if not found:
        raise MetadataProblem(f"{file} lists no {noun}s")
    return found


def _controls(file: Path, place: str, entry: dict[str, Any], folder: Path) -> tuple[str, ...]:
    """control_path, or control_path_0, control_path_1 … in the order of their numbers."""
    numbered = [(int(name.rpartition("_")[2]), name) for name in entry if re.fullmatch(r"control_path_\d+", name)]
    names = ["control_path"] * ("control_path" in entry) + [name for _, name in sorted(numbered)]
    for name in names:
        if not isinstance(entry[name], str):
            raise MetadataProblem(f"{file.name}, {place}: {name} must be text")
    return tuple(_below(file, place, entry[name], folder, "image") for name in names)


def _entries(file: Path, key: str) -> Iterator[tuple[str, Any, Any]]:
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
            yield f"line {number}", entry.get(key) if isinstance(entry, dict) else None, entry


def _parsed(file: Path, place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise MetadataProblem(f"{file.name}, {place}: no JSON ({error})") from None


def _below(file: Path, place: str, name: str, folder: Path, kind: str) -> str:
    """The path below the folder; an ending that the list leaves out is found."""
    whole = os.path.normpath(os.path.join(folder, name))
    relative = os.path.relpath(whole, folder)
    if relative.startswith(os.pardir) or os.path.isabs(relative):
        raise MetadataProblem(
            f"{file.name}, {place}: {name} lies outside of {folder}",
            f"put the list into the folder of its {'videos' if kind == 'video' else 'pictures'}",
        )
    endings = ENDINGS[kind]
    if os.path.splitext(whole)[1].lower() in endings or (kind == "video" and os.path.isdir(whole)):
        return relative
    ending = next((ending for ending in sorted(endings) if os.path.exists(whole + ending)), None)
    if ending is None:
        raise MetadataProblem(f"{file.name}, {place}: there is no {'picture' if kind == 'image' else kind} {name}")
    return relative + ending
