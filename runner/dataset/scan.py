"""Reads the files of a run's folders. Files that have not changed since they were last read are not read again."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from runner.dataset.buckets import Size
from runner.dataset.caption_files import link_problem, list_folder, note_captions, note_unused, pair, read_caption
from runner.dataset.encodings import Mask
from runner.dataset.folders import NOUNS, Folder, SourceProblem
from runner.dataset.frames import frame_names
from runner.dataset.media import endings, is_media
from runner.dataset.metadata import control_problem
from runner.dataset.notes import Notes
from runner.dataset.probe import probe_image, probe_video
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
    """Lists and reads the folders; what is left out or read in a way to be known goes to `notes`. Raises `SourceProblem` where
    a folder has no pictures at all."""
    items: list[Item] = []
    bad: list[BadItem] = []
    notes = Notes() if notes is None else notes
    for folder in folders:
        reading = _Reading(folder, index, progress, notes)
        count = reading.read()
        items += reading.items
        bad += reading.bad
        if count == 0:
            raise SourceProblem(folder.number, f"no {folder.noun} in {folder.path}")
    return Scan(items, bad)


class _Reading:
    """Reads one folder."""

    def __init__(self, folder: Folder, index: Index, progress: Progress | None, notes: Notes) -> None:
        self.folder, self.index, self.progress, self.notes = folder, index, progress, notes
        self.location, self.extension = str(folder.path), folder.options.caption_extension
        self.items: list[Item] = []
        self.bad: list[BadItem] = []
        self.near: dict[str, str] = {}
        """Picture without a caption → the file that may have been meant."""

    def read(self) -> int:
        """How many files of its kind there are."""
        folder = self.folder
        pictures: Collection[str]
        if folder.listing is None:
            pictures, captions = self._pair()
        else:
            pictures = [name for name, entry in folder.listing.items() if entry.problem is None]
            captions = {}
            for name, entry in folder.listing.items():
                if entry.problem is not None:
                    self._refuse(name, entry.problem)
        known = self._known(pictures, set(captions.values()))
        try:
            masks = _Companions(folder.masks, self.index, self.notes) if folder.masks is not None else None
            controls = _Controls(folder, self.index)
        except OSError as error:
            raise SourceProblem(folder.number, f"{error.filename} cannot be read: {error.strerror}") from None
        texts: dict[str, str] = {}
        empty: list[str] = []
        without: list[str] = []
        listing = folder.listing
        for name in pictures:
            picture, caption = known[name], known.get(captions.get(name, ""))
            label = f"{folder.label}/{name}" if listing is None else self.label(name)
            text = None if caption is None else caption.text
            if listing is not None:
                text = listing[name].caption or None
            own = text
            if text is None:
                text = folder.class_tokens
            mask = Mask(None, "") if folder.options.alpha_mask else None
            problem = picture.problem or (caption.problem if caption is not None else None)
            if problem is None and text is None:
                problem = self._no_caption(name)
            if problem is None and masks is not None:
                stem = os.path.splitext(os.path.basename(name))[0]
                mask = masks.found.get(stem)
                problem = None if mask else masks.problem(stem, "mask")
            found: tuple[Mask, ...] = ()
            if problem is None and controls.wanted:
                found, problem = controls.of(name)
            if problem is not None:
                self._refuse(name, problem)
                continue
            assert text is not None
            if own is None:
                without.append(label)
            else:
                texts[label] = text
                if not text or text.isspace():
                    empty.append(label)
            size = (picture.width, picture.height)
            frames = int(picture.text or 1) if folder.kind == "video" else 0
            path = f"{self.location}/{name}" if listing is None else os.path.join(self.location, name)
            self.items.append(Item(folder, label, path, picture.digest, size, text, mask, frames, found, picture.facts))
        self._note(texts, empty, without)
        return len(pictures) + len(self.bad)

    def _note(self, texts: dict[str, str], empty: list[str], without: list[str]) -> None:
        """What is to be said of captions and of what the files hold."""
        if self.folder.class_tokens is not None:
            where = "have no caption file" if self.folder.listing is None else "have no caption in their list"
            self.notes.add(
                f"{self.folder.noun} {where} and use `{self.folder.class_tokens}`", f"a caption lies beside its picture, as NAME{self.extension}"
                if self.folder.listing is None else "give each a caption there", without, of=len(self.items),
            )  # fmt: skip
        if not self.folder.whole_captions:
            note_captions(texts, self.folder.options.enable_wildcard, self.notes)
        self.notes.add("captions are empty, and what they belong to is trained without words", "write them; or delete the files, so that class_tokens are used", empty)  # fmt: skip
        _note_media(self.folder.noun, self.items, self.notes)

    def label(self, name: str) -> str:
        """Its name for people, without the places of this machine."""
        return f"{self.folder.label}/{os.path.basename(name) if os.path.isabs(name) else name}"

    def _refuse(self, name: str, problem: str) -> None:
        self.bad.append(BadItem(self.folder.number, self.label(name), problem))

    def _no_caption(self, name: str) -> str:
        if self.folder.listing is not None:
            return "has no caption in its list, and its source no class_tokens"
        wanted = name[: name.rfind(".")] + self.extension
        near = f"; {self.near[name]} is none" if name in self.near else ""
        return f"has no caption file ({wanted}{near}), and its source no class_tokens"

    def _pair(self) -> tuple[list[str], dict[str, str]]:
        """The pictures or videos, and the caption file of each; what nothing uses is noted."""
        folder, label = self.folder, self.folder.label
        entries = folder.entries or list_folder(self.location)
        pictures = [name for name in entries.files if is_media(name, folder.kind)]
        known = set(pictures)
        named_so = [name for name in entries.folders if is_media(name, folder.kind)]  # reading them says what they are
        pairing = pair(pictures, [name for name in entries.files if name not in known], self.extension)
        self.near = pairing.near
        note_unused(pairing, label, self.extension, self.notes)
        other = "video" if folder.kind == "image" else "image"
        others = [name for name in pairing.rest if is_media(name, other)]
        self.notes.add(
            f"{NOUNS[other]} lie among {folder.noun} and are not used", f'name the folder again as a source of kind = "{other}"',
            [f"{label}/{name}" for name in others],
        )  # fmt: skip
        rest = sorted(set(pairing.rest).difference(others), key=lambda name: (os.path.splitext(name)[1], name))
        self.notes.add(
            f"files are neither {folder.noun} nor captions and are not used", f"{folder.noun} end in {endings(folder.kind)}",
            [f"{label}/{name}" for name in rest],
        )  # fmt: skip
        self.notes.add(
            f"folders lie among {folder.noun} and are not read", "name each as a source of its own",
            [f"{label}/{name}" for name in entries.folders if name not in named_so],
        )  # fmt: skip
        for name in entries.unreadable:
            if is_media(name, folder.kind):
                self._refuse(name, "has a name that is not UTF-8; rename it")
        self.notes.add(
            "names are not UTF-8, and what they name is left out", "rename them",
            [f"{label}/{name}" for name in entries.unreadable if not is_media(name, folder.kind)],
        )  # fmt: skip
        return self._followed([*pictures, *named_so], pairing.captions, entries.links)

    def _followed(
        self, pictures: list[str], captions: dict[str, str], links: frozenset[str]
    ) -> tuple[list[str], dict[str, str]]:
        """Without pictures whose caption is a link that may not be followed: it could show the text of any file."""
        if self.folder.follow_links or not links.intersection(captions.values()):
            return pictures, captions
        real = os.path.realpath(self.location)
        refused = set()
        for name, caption in captions.items():
            problem = link_problem(self.location, caption, real) if caption in links else None
            if problem is not None:
                self._refuse(name, f"is left out: its caption file {problem}")
                refused.add(name)
        return [name for name in pictures if name not in refused], captions

    def _known(self, pictures: Collection[str], captions: set[str]) -> dict[str, FileContent]:
        """What the files are, read only where they have changed."""
        folder, index = self.folder, self.index
        sequences = folder.listing is not None and folder.kind == "video"
        folders = {name for name in pictures if sequences and os.path.isdir(os.path.join(self.location, name))}
        probe = probe_video if folder.kind == "video" else probe_image
        elsewhere: dict[str, list[str]] = {}
        for name in pictures if folder.listing is not None else ():
            if os.path.isabs(name) and name not in folders:
                elsewhere.setdefault(os.path.dirname(name), []).append(os.path.basename(name))
        known = index.unchanged(self.location, captions.union(pictures))
        own = [
            name for name in pictures
            if name not in known and name not in folders and not (elsewhere and os.path.isabs(name))
        ]  # fmt: skip
        known.update(_read_anew(self.location, own, index, probe, self.progress))
        for place, names in elsewhere.items():
            there = index.unchanged(place, names)
            there.update(_read_anew(place, [name for name in names if name not in there], index, probe, self.progress))
            known.update({os.path.join(place, name): content for name, content in there.items()})
        known.update({name: _sequence(os.path.join(self.location, name), index) for name in folders})
        texts = [name for name in captions if name not in known]
        known.update(_read_anew(self.location, texts, index, read_caption, None))
        return known


class _Companions:
    """The pictures of a folder that belong to others by their names: masks, control images."""

    def __init__(self, folder: Path, index: Index, notes: Notes | None = None) -> None:
        """With `notes` they are masks; without, control images, whose transparency is a mask."""
        self.folder = folder
        names = [name for name in list_folder(folder).files if is_media(name, "image")]
        known = known_pictures(str(folder), names, index)
        if notes is not None:
            notes.add(
                "masks have transparent pixels, which do not count", "paint them white where they should",
                [f"{folder.name}/{name}" for name in names if TRANSPARENT in known[name].facts],
            )  # fmt: skip
        self.found: dict[str, Mask] = {}
        """Name without its ending → picture."""
        self.broken: dict[str, str] = {}
        for name in names:
            stem, content = os.path.splitext(name)[0], known[name]
            if content.problem is None:
                self.found[stem] = Mask(
                    f"{folder}/{name}", content.digest, decoding(content.facts, masked=notes is None)
                )
            else:
                self.broken[stem] = f"{name} in {folder} {content.problem}"

    def problem(self, stem: str, what: str) -> str:
        """Why there is none of this name."""
        return (
            f"has a {what} that cannot be used: {self.broken[stem]}"
            if stem in self.broken
            else f"has no {what} in {self.folder}"
        )


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
        self.files = _Companions(folder.controls, index) if folder.controls is not None else None
        listed = folder.listing is not None and any(entry.controls for entry in folder.listing.values())
        self.wanted = folder.controls is not None or listed

    def of(self, name: str) -> tuple[tuple[Mask, ...], str | None]:
        """(`name`'s own control image, or name_0, name_1 … in the order of their numbers; why there is none)."""
        if self.folder.listing is not None and self.folder.listing[name].controls:
            return self._listed(self.folder.listing[name].controls)
        if self.files is None:
            return (), "has no control image in its list"
        stem = os.path.splitext(os.path.basename(name))[0]
        if stem in self.files.found:
            return (self.files.found[stem],), None
        numbered = re.compile(re.escape(stem) + r"_([0-9]{1,9})")
        broken = [other for other in (stem, *self.files.broken) if other in self.files.broken and (other == stem or numbered.fullmatch(other))]  # fmt: skip
        if broken:
            return (), self.files.problem(broken[0], "control image")
        several = [
            (int(match.group(1)), mask)
            for other, mask in self.files.found.items()
            if (match := numbered.fullmatch(other))
        ]
        found = tuple(mask for _, mask in sorted(several, key=lambda pair: pair[0]))
        return found, None if found else self.files.problem(stem, "control image")

    def _listed(self, names: tuple[str, ...]) -> tuple[tuple[Mask, ...], str | None]:
        found = []
        for path in names:
            problem = control_problem(self.folder.path, path, self.folder.follow_links)
            if problem is not None:
                return (), problem
            place, last = os.path.split(os.path.normpath(os.path.join(self.folder.path, path)))
            content = known_pictures(place, [last], self.index)[last]
            if content.problem is not None:
                return (), f"names the control image {path}, which {content.problem}"
            found.append(Mask(f"{place}/{last}", content.digest, decoding(content.facts, masked=True)))
        return tuple(found), None


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
