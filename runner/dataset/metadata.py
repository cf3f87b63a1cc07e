"""Lists of pictures or videos with captions, as sd-scripts and musubi-tuner read them: JSON `{path: {caption, tags}}`, or
JSONL lines `{image_path, caption, tags, control_path, control_path_0 …}` and `{video_path, caption}`, where a video may be a
folder of pictures. Paths are relative to the list's folder, or absolute; torch-free."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from runner.dataset.caption_files import is_text, link_problem, list_folder
from runner.dataset.notes import Notes
from runner.files import name_problem, parsing, read_bytes, reason, shown_path
from runner.media import ENDINGS, is_media

METADATA_SUFFIXES = (".json", ".jsonl")
MAX_BYTES = 500_000_000
_READ = {"image_path", "video_path", "caption", "tags", "control_path", "train_resolution"}
"""Keys of an entry. sd-scripts writes the resolution, which follows from the picture and the buckets."""
_NUMBERED = re.compile(r"control_path_[0-9]{1,9}")


class MetadataProblem(Exception):
    """A list that cannot be used."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class Listed(NamedTuple):
    """What a list says of a picture or video: its caption (empty where there is none) and its control images."""

    caption: str
    controls: tuple[str, ...] = ()
    problem: str | None = None
    """Why it cannot be used."""


def read_metadata(
    file: Path, folder: Path, kind: str = "image", notes: Notes | None = None, follow_links: bool = True
) -> dict[str, Listed]:
    """Path of each picture or video, relative to `folder` where it lies below it → what the list says of it. Raises
    `MetadataProblem`."""
    noun = "video" if kind == "video" else "picture"
    found: dict[str, Listed] = {}
    twice: dict[str, None] = {}
    unread: Counter[str] = Counter()
    places = _Places(folder, kind, follow_links)
    for place, name, entry in _entries(file, f"{kind}_path"):
        if not isinstance(name, str) or not isinstance(entry, dict):
            raise _no_entry(file, place, entry, kind)
        unread.update(name for name in entry.keys() - _READ if not _NUMBERED.fullmatch(name))
        parts = [entry.get("caption"), entry.get("tags")]
        if any(part is not None and not isinstance(part, str) for part in parts):
            raise MetadataProblem(f"{file.name}, {place}: caption and tags must be text")
        caption = ", ".join(part for part in parts if part)
        for text in (name, caption, *(own := _controls(file, place, entry))):
            if not is_text(text) or "\x00" in text:
                what = "a NUL character" if "\x00" in text else "half a character (a lone surrogate)"
                raise MetadataProblem(f"{file.name}, {place}: {text[:60]!a} holds {what}", "take it out")
        path, problem = places.find(name)
        if path in found:
            twice[path] = None
        found[path] = Listed(caption, own, problem)
    if not found:
        raise MetadataProblem(f"{file} lists no {noun}s")
    if notes is not None:
        notes.add(
            f"~keys of {file.name} ~are not read",
            "a caption stands under `caption` and `tags`; a source has options for all of its files",
            [
                f"{name!a} of {count:,} {noun}s" if count > 1 else f"{name!a} of one {noun}"
                for name, count in sorted(unread.items())
            ],
        )
        notes.add(
            f"~{noun}s ~are listed more than once in {file.name}, and only the last line counts",
            "list each once",
            twice,
        )
    return found


def _no_entry(file: Path, place: str, entry: Any, kind: str) -> MetadataProblem:
    """What is wrong with a part of a list that names no file."""
    if file.suffix.lower() == ".json":
        return MetadataProblem(
            f"{file.name}, {place}: it has no table of caption and tags", 'write {"a.png": {"caption": "a cat"}}'
        )
    line = f'{{"{kind}_path": "{"a.mp4" if kind == "video" else "a.png"}", "caption": "a cat"}}'
    other = "image" if kind == "video" else "video"
    if not isinstance(entry, dict):
        return MetadataProblem(f"{file.name}, {place}: it is no table", f"a line is {line}")
    hint = f"a line is {line}"
    if f"{other}_path" in entry:
        hint = f'`{other}_path` is for a source of kind = "{other}"; make a list for each kind'
    elif "file_name" in entry:
        hint = f"{hint}; `file_name` and `text` are the names of other tools"
    return MetadataProblem(f"{file.name}, {place}: it has no `{kind}_path`", hint)


def note_unlisted(name: str, folder: Path, kind: str, listing: Mapping[str, Listed], notes: Notes) -> None:
    """Says which pictures or videos of a folder its list leaves out."""
    try:
        files = list_folder(folder).files
    except OSError:  # what is listed cannot be read either, which is said of each
        return
    left_out = [f"{folder.name}/{file}" for file in files if is_media(file, kind) and file not in listing]
    noun = "videos" if kind == "video" else "pictures"
    notes.add(f"~{noun} ~are not listed in {name} and ~are not used", "list ~them", left_out)


def _controls(file: Path, place: str, entry: dict[str, Any]) -> tuple[str, ...]:
    """control_path, or control_path_0, control_path_1 … in the order of their numbers."""
    numbered = [(int(name.rpartition("_")[2]), name) for name in entry if _NUMBERED.fullmatch(name)]
    names = ["control_path"] * ("control_path" in entry) + [name for _, name in sorted(numbered)]
    for name in names:
        if not isinstance(entry[name], str):
            raise MetadataProblem(f"{file.name}, {place}: {name} must be text")
    return tuple(entry[name] for name in names)


def _entries(file: Path, key: str) -> Iterator[tuple[str, Any, Any]]:
    """(place for messages, path, entry)."""
    try:
        text = read_bytes(file, MAX_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise MetadataProblem(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise MetadataProblem(f"{file} cannot be read: {reason(error)}") from None
    if file.suffix.lower() == ".json":
        content = _parsed(file, "the file", text)
        if not isinstance(content, dict):
            raise MetadataProblem(
                f"{file.name} is no table of pictures", "a list of tables is a .jsonl file, with one table in each line"
            )
        yield from ((ascii(name), name, entry) for name, entry in content.items())
        return
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if line.strip():
            entry = _parsed(file, f"line {number}", line)
            yield f"line {number}", entry.get(key) if isinstance(entry, dict) else None, entry


def _parsed(file: Path, place: str, text: str) -> Any:
    with parsing(lambda why: MetadataProblem(f"{file.name}, {place}: no JSON ({why})")):
        return json.loads(text)


class _Places:
    """Where the files of a list are."""

    def __init__(self, folder: Path, kind: str, follow_links: bool) -> None:
        self.folder, self.kind, self.follow_links = folder, kind, follow_links
        self.endings = ENDINGS[kind]
        self._real: dict[str, tuple[str, bool]] = {}
        """Folder of a file → the real path of the folder that it is named in, and whether it lies there."""

    def find(self, name: str) -> tuple[str, str | None]:
        """(path, why it cannot be used). The path is relative to the folder where the file lies below it; an ending that the
        list leaves out is found."""
        noun = "picture" if self.kind == "image" else self.kind
        wrong = name_problem(name)
        if wrong is not None:
            return shown_path(name), f"is listed, but {wrong}"
        whole = os.path.normpath(os.path.join(self.folder, name))
        if "\\" in name and os.sep == "/" and not os.path.exists(whole):
            return name, "is listed with backslashes, as Windows writes paths; write it with /"
        if os.path.splitext(whole)[1].lower() not in self.endings and not (
            self.kind == "video" and os.path.isdir(whole)
        ):
            ending = next((ending for ending in sorted(self.endings) if os.path.exists(whole + ending)), None)
            if ending is None:
                return name, f"is listed, but there is no {noun} {name}"
            whole += ending
        return self._relative(whole), None if self.follow_links else self.link_problem(whole)

    def _relative(self, whole: str) -> str:
        relative = os.path.relpath(whole, self.folder)
        return whole if relative.startswith(os.pardir) else relative

    def link_problem(self, whole: str) -> str | None:
        """Why a file may not be read: it is a symbolic link out of the folder that it is named in."""
        place, name = os.path.split(whole)
        if place not in self._real:
            named_in = os.path.realpath(place if os.path.isabs(self._relative(whole)) else self.folder)
            self._real[place] = named_in, Path(os.path.realpath(place)).is_relative_to(named_in)
        named_in, inside = self._real[place]
        if inside and not os.path.islink(whole):
            return None
        return link_problem(place, name, named_in)


def control_problem(folder: Path, name: str, follow_links: bool) -> str | None:
    """Why a listed control image cannot be used, as far as its name tells."""
    wrong = name_problem(name)
    if wrong is not None:
        return f"names a control image that cannot be: {wrong}"
    whole = os.path.normpath(os.path.join(folder, name))
    if not os.path.exists(whole):
        parts = [part.strip() for part in name.split(",")]
        if len(parts) > 1:
            several = " and ".join(f"control_path_{number}" for number in range(len(parts)))
            return f"has {len(parts)} control images in one name, {name!r}; give them as {several}"
        return f"names the control image {name}, which does not exist"
    problem = None if follow_links else _Places(folder, "image", False).link_problem(whole)
    return f"names a control image that is not read: {problem}" if problem is not None else None
