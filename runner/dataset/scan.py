"""Reads the files of a run's folders. Files that have not changed since they were last read are not read again."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from runner.dataset.buckets import Size
from runner.dataset.encodings import Mask
from runner.dataset.folders import Folder, SourceProblem
from runner.dataset.frames import frame_names
from runner.dataset.media import is_media
from runner.dataset.notes import Notes
from runner.dataset.probe import probe_caption, probe_image, probe_video
from runner.pictures import ANIMATED, GROUND, TRANSPARENT, decoding
from runner.store.index import FileContent, Index, Stamp, stamp

Progress = Callable[[int, int], None]


class Item(NamedTuple):
    """A usable picture or video with its caption's text as the file holds it. `name` is for people."""

    folder: Folder
    name: str
    path: str
    digest: str
    size: Size
    text: str
    mask: Mask | None = None
    frames: int = 0
    """Frames of a video; 0: a picture."""
    controls: tuple[Mask, ...] = ()
    """Control images: their files and digests."""
    facts: str = ""
    """Of the picture or video, as the index holds them."""


@dataclass(frozen=True, slots=True)
class BadItem:
    """A picture that cannot be used, and why."""

    number: int
    name: str
    reason: str


@dataclass(frozen=True)
class Scan:
    """What the folders hold."""

    items: list[Item]
    bad: list[BadItem]


def scan(folders: Iterable[Folder], index: Index, progress: Progress | None = None, notes: Notes | None = None) -> Scan:
    """Lists and reads the folders; what is left out or read in a way to be known goes to `notes`. Raises `SourceProblem` where a folder has no pictures at all."""
    items: list[Item] = []
    bad: list[BadItem] = []
    notes = Notes() if notes is None else notes
    for folder in folders:
        names = _scan_folder(folder, index, progress, items, bad, notes)
        if names == 0:
            raise SourceProblem(folder.number, f"no {folder.noun} in {folder.path}")
    return Scan(items, bad)


def _scan_folder(
    folder: Folder, index: Index, progress: Progress | None, items: list[Item], bad: list[BadItem], notes: Notes
) -> int:
    location, extension = str(folder.path), folder.options.caption_extension
    if folder.listing is not None:
        captions = dict.fromkeys(folder.listing, "")
        present: set[str] = set()
    else:
        listing = os.listdir(location)
        captions = {name: name[: name.rfind(".")] + extension for name in listing if is_media(name, folder.kind)}
        present = set(captions.values()).intersection(listing)
    before = len(items)
    masks = _masks(folder.masks, index, notes) if folder.masks is not None else None
    controls = _Controls(folder, index)
    probe = probe_video if folder.kind == "video" else probe_image
    known = index.unchanged(location, present.union(captions))
    sequences = folder.listing is not None and folder.kind == "video"
    folders = {name for name in captions if sequences and os.path.isdir(f"{location}/{name}")}
    fresh = [name for name in captions if name not in known and name not in folders]
    known.update(_read_anew(location, fresh, index, probe, progress))
    known.update({name: _sequence(f"{location}/{name}", index) for name in folders})
    known.update(_read_anew(location, [name for name in present if name not in known], index, probe_caption, None))
    for name, caption_name in captions.items():
        picture, caption = known[name], known.get(caption_name)
        label = f"{folder.label}/{name}"
        text = folder.class_tokens if caption is None else caption.text
        if folder.listing is not None:
            text = folder.listing[name].caption or folder.class_tokens
        mask = Mask(None, "") if folder.options.alpha_mask else None
        if masks is not None:
            mask = masks.get(os.path.splitext(os.path.basename(name))[0])
        if picture.problem is not None:
            bad.append(BadItem(folder.number, label, picture.problem))
        elif caption is not None and caption.problem is not None:
            bad.append(BadItem(folder.number, label, caption.problem))
        elif text is None:
            bad.append(
                BadItem(folder.number, label, f"has no caption file ({caption_name}), and its source no class_tokens")
            )
        elif masks is not None and mask is None:
            bad.append(BadItem(folder.number, label, f"has no mask in {folder.masks}"))
        elif controls.wanted and not (own := controls.of(name)):
            bad.append(BadItem(folder.number, label, f"has no control image in {folder.controls or folder.path}"))
        else:
            size = (picture.width, picture.height)
            frames = int(picture.text or 1) if folder.kind == "video" else 0
            found = own if controls.wanted else ()
            items.append(
                Item(
                    folder, label, f"{location}/{name}", picture.digest, size, text, mask, frames, found, picture.facts
                )
            )
    _note_media(folder.noun, items[before:], notes)
    return len(captions)


def _note_media(noun: str, items: list[Item], notes: Notes) -> None:
    """What is left of pictures and videos that hold more than is trained on."""
    told = [item for item in items if item.facts]
    notes.add(
        "pictures have several frames or pages; the first is used", 'kind = "video" trains on frames',
        sorted(item.name for item in told if ANIMATED in item.facts),
    )  # fmt: skip
    notes.add(
        f"{noun} have transparent pixels; {GROUND} stands behind them",
        "alpha_mask = true trains only on what is opaque; for another ground, paint it" if noun == "pictures"
        else "for another ground, paint it",
        sorted(
            item.name for item in told if TRANSPARENT in item.facts and not (item.mask and item.mask.path is None)
        ),
    )  # fmt: skip


class _Controls:
    """The control images of a folder's pictures, by the same names or by its list."""

    def __init__(self, folder: Folder, index: Index) -> None:
        self.folder, self.index = folder, index
        self.files = _masks(folder.controls, index) if folder.controls is not None else {}
        listed = folder.listing is not None and any(entry.controls for entry in folder.listing.values())
        self.wanted = folder.controls is not None or listed

    def of(self, name: str) -> tuple[Mask, ...]:
        """`name`'s own control image, or name_0, name_1 … in the order of their numbers."""
        if self.folder.listing is not None and self.folder.listing[name].controls:
            found = []
            for path in self.folder.listing[name].controls:
                place, last = os.path.split(os.path.join(self.folder.path, path))
                content = known_pictures(place, [last], self.index)[last]
                if content.problem is not None:
                    return ()
                found.append(Mask(f"{place}/{last}", content.digest, decoding(content.facts, masked=True)))
            return tuple(found)
        stem = os.path.splitext(os.path.basename(name))[0]
        if stem in self.files:
            return (self.files[stem],)
        numbered = re.compile(re.escape(stem) + r"_(\d+)")
        several = [
            (int(match.group(1)), mask) for other, mask in self.files.items() if (match := numbered.fullmatch(other))
        ]
        return tuple(mask for _, mask in sorted(several, key=lambda pair: pair[0]))


def _sequence(location: str, index: Index) -> FileContent:
    """A folder of pictures as a video."""
    try:
        names = frame_names(location)
    except OSError as error:
        return FileContent("", problem=f"cannot be read: {error.strerror}")
    if not names:
        return FileContent("", problem="is a folder without pictures")
    known = known_pictures(location, names, index)
    broken = next((name for name in names if known[name].problem is not None), None)
    if broken is not None:
        return FileContent("", problem=f"its frame {broken} {known[broken].problem}")
    first = known[names[0]]
    for name in names:
        size = known[name].width, known[name].height
        if size != (first.width, first.height):
            problem = f"its frame {name} is {size[0]}x{size[1]}, the first, {names[0]}, {first.width}x{first.height}"
            return FileContent("", problem=problem)
    digest = hashlib.sha256("\n".join(known[name].digest for name in names).encode()).hexdigest()
    facts = " ".join(dict.fromkeys(word for name in names for word in known[name].facts.split()))
    return FileContent(digest, first.width, first.height, str(len(names)), facts=facts)


def known_pictures(location: str, names: list[str], index: Index) -> dict[str, FileContent]:
    """What pictures of a folder are, read only where they have changed."""
    known = index.unchanged(location, names)
    known.update(_read_anew(location, [name for name in names if name not in known], index, probe_image, None))
    return known


def _masks(folder: Path, index: Index, notes: Notes | None = None) -> dict[str, Mask]:
    """Name without its ending → mask; without `notes`, → control image, whose transparency is a mask."""
    location = str(folder)
    names = [name for name in os.listdir(location) if is_media(name, "image")]
    known = known_pictures(location, names, index)
    if notes is not None:
        notes.add(
            "masks have transparent pixels, which do not count", "paint them white where they should",
            [f"{folder.name}/{name}" for name in names if TRANSPARENT in known[name].facts],
        )  # fmt: skip
    return {
        os.path.splitext(name)[0]: Mask(
            f"{location}/{name}", known[name].digest, decoding(known[name].facts, masked=notes is None)
        )
        for name in names
        if known[name].problem is None
    }


def _read_anew(
    location: str, names: list[str], index: Index, probe: Callable[[Path], FileContent], progress: Progress | None
) -> dict[str, FileContent]:
    """Reads these files in parallel, and remembers what they hold."""
    found: dict[str, FileContent] = {}
    fresh: list[tuple[str, Stamp, FileContent]] = []

    def read(name: str) -> tuple[str, Stamp, FileContent]:
        path = Path(location, name)
        try:
            before = stamp(path.stat())  # a file that changes while it is read is read again next time
        except OSError:  # a link to nothing: the probe says so
            before = (0, 0, 0, 0)
        return name, before, probe(path)

    if not names:
        return found
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for done, entry in enumerate(pool.map(read, names), 1):
            found[entry[0]] = entry[2]
            if entry[2].problem is None or entry[2].digest:  # what could not be read may be readable the next time
                fresh.append(entry)
            if progress is not None:
                progress(done, len(names))
            if len(fresh) >= 2000:
                index.put_files(location, fresh)
                fresh = []
    index.put_files(location, fresh)
    return found
