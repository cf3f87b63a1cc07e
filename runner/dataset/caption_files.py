"""What lies in a folder: which text file is which picture's caption, how it reads, and what nothing uses; torch-free."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from runner.dataset.captions import lines_of
from runner.dataset.notes import Notes
from runner.files import read_bytes
from runner.store.index import FileContent

MAX_CAPTION_BYTES = 1_000_000
_TEXT_ENDINGS = frozenset({".txt", ".text", ".md", ".caption", ".captions", ".tags", ".tag", ".cap", ".prompt"})
"""Files that people write captions into."""
_FACE = re.compile(r"_\d+_\d+_\d+_\d+$")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class Entries(NamedTuple):
    """The entries of a folder, hidden ones left out. `links` are those of the files that are symbolic links."""

    files: list[str]
    folders: list[str]
    links: frozenset[str]
    unreadable: list[str]
    """Names that are not UTF-8, as they can be shown."""


def list_folder(location: str | Path) -> Entries:
    """Sorted. Raises `OSError`."""
    files: list[str] = []
    folders: list[str] = []
    links: list[str] = []
    with os.scandir(location) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            if _is_folder(entry):
                folders.append(name)
            else:
                files.append(name)
                if entry.is_symlink():
                    links.append(name)
    unreadable: list[str] = []
    if not is_text("".join(files)) or not is_text("".join(folders)):
        unreadable = sorted(shown(name) for name in (*files, *folders) if not is_text(name))
        files, folders = ([name for name in names if is_text(name)] for names in (files, folders))
    return Entries(sorted(files), sorted(folders), frozenset(links), unreadable)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def is_text(name: str) -> bool:
    """Whether a name (or any other text) can be written as UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(name: str) -> str:
    """A name for messages; bytes of it that are no UTF-8 are written as `\\xff`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace") if not is_text(name) else name


def read_caption(path: Path) -> FileContent:
    """The caption file's text, which is its own identity: UTF-8, a byte order mark is tolerated."""
    try:
        content = read_bytes(path, MAX_CAPTION_BYTES)
        text = content.decode("utf-8-sig")
    except OSError as error:
        return _unusable(path, f"cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        why = "is UTF-16; save it as UTF-8" if content.startswith(_UTF16) else f"is not UTF-8 (byte {error.start})"
        return _unusable(path, why)
    if "\x00" in text:
        return _unusable(path, "holds NUL characters; save it as UTF-8")
    return FileContent("", text=text)


def _unusable(path: Path, why: str) -> FileContent:
    return FileContent("", problem=f"has a caption file that cannot be used: {path.name} {why}")


@dataclass(kw_only=True)
class Pairing:
    """Which caption file is whose."""

    captions: dict[str, str] = field(default_factory=dict)
    """Picture → its caption file."""
    second: list[str] = field(default_factory=list)
    """Files that differ from a used one in case or Unicode form only."""
    whole: list[str] = field(default_factory=list)
    """`picture.jpeg.txt`: named after a picture's whole name."""
    other_ending: dict[str, list[str]] = field(default_factory=dict)
    """Ending → files that are named after a picture."""
    orphans: list[str] = field(default_factory=list)
    """Text files that belong to no picture."""
    near: dict[str, str] = field(default_factory=dict)
    """Picture without a caption → the file that may have been meant."""
    rest: list[str] = field(default_factory=list)
    """Neither pictures nor text files."""


def pair(pictures: Collection[str], others: Iterable[str], extension: str) -> Pairing:
    """Finds each picture's caption file. Endings are compared without case, names after Unicode NFC; where several files are
    left, the one with the very name is taken, else the first by name."""
    found = Pairing()
    others = set(others)
    for name in pictures:
        own = name[: name.rfind(".")] + extension
        if own in others:
            found.captions[name] = own
    left = sorted(others.difference(found.captions.values()))
    if not left and len(found.captions) == len(pictures):
        return found
    texts: list[str] = []
    for name in left:
        (texts if _is_text_file(name, extension) else found.rest).append(name)
    missing = [name for name in pictures if name not in found.captions]
    by_stem: dict[str, list[str]] = defaultdict(list)
    for name in (*texts, *found.captions.values()):
        if name.lower().endswith(extension.lower()):
            by_stem[normal(name[: -len(extension)])].append(name)
    for name in missing:
        stem = normal(name[: name.rfind(".")])
        candidates = by_stem.get(stem) or by_stem.get(_FACE.sub("", stem), [])
        if candidates:
            found.captions[name] = min(candidates, key=lambda own: (not own.endswith(extension), own))
    _sort_left(found, pictures, texts, extension)
    return found


def _sort_left(found: Pairing, pictures: Collection[str], texts: list[str], extension: str) -> None:
    """Tells what kind each text file is that is not used."""
    used = set(found.captions.values())
    left = [name for name in texts if name not in used]
    if not left:
        return
    stems = {normal(name[: name.rfind(".")]).casefold(): name for name in pictures}
    names = {normal(name).casefold(): name for name in pictures}
    for name in left:
        stem, ending = os.path.splitext(name)
        stem = normal(stem).casefold()
        own = names.get(stem) or stems.get(stem)
        if own is None:
            found.orphans.append(name)
            continue
        if own not in found.captions:
            found.near.setdefault(own, name)
        if stem in names:
            found.whole.append(name)
        elif ending.lower() != extension.lower():
            found.other_ending.setdefault(ending, []).append(name)
        elif own in found.captions:
            found.second.append(name)
        else:
            found.orphans.append(name)


def note_unused(found: Pairing, folder: str, extension: str, notes: Notes) -> None:
    """Says which text files of a folder are not used, and how they would be."""

    def listed(names: Iterable[str]) -> list[str]:
        return [f"{folder}/{name}" for name in names]

    notes.add(
        "text ~files ~are named after a picture's whole name and ~are not used",
        f"name ~them without the picture's ending: NAME{extension}",
        listed(found.whole),
    )
    for ending, names in sorted(found.other_ending.items()):
        notes.add(
            f"text ~files that ~are named after a picture ~end in {ending} and ~are not used; captions end in {extension}",
            f'set caption_extension = "{ending}", or rename ~them',
            listed(names),
        )
    notes.add(
        "text ~files ~differ from a picture's caption file only in case or Unicode form and ~are not used",
        "keep one of them",
        listed(found.second),
    )
    notes.add(
        "text ~files ~belong to no picture and ~are not used",
        f"a caption has its picture's name, NAME{extension} beside NAME.png",
        listed(found.orphans),
    )


def link_problem(location: str, name: str, real_folder: str) -> str | None:
    """Why a symbolic link may not be followed: it leads out of its folder, whose real path is `real_folder`. None: it may, or
    there is nothing at its end."""
    target = os.path.realpath(os.path.join(location, name))
    if Path(target).is_relative_to(real_folder) or not os.path.exists(target):
        return None
    return f"{name} is a link out of its folder, to {shown(target)}; dataset.follow_links = true allows such links"


def _is_text_file(name: str, extension: str) -> bool:
    return os.path.splitext(name)[1].lower() in _TEXT_ENDINGS or name.lower().endswith(extension.lower())


def normal(text: str) -> str:
    """The form in which names are compared: Unicode NFC."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def note_captions(texts: Mapping[str, str], wildcard: bool, notes: Notes) -> None:
    """Says of captions (name → text) of which one line is used how many have several."""
    several = () if wildcard else (name for name, text in texts.items() if "\n" in text or "\r" in text)
    notes.add(
        "~captions ~have several lines, of which the first is used",
        "enable_wildcard = true draws one of the lines at each use; or write each caption into one line",
        [name for name in several if len(lines_of(texts[name])) > 1],
        of=len(texts),
    )
