"""Reads the files of a run's folders. Files that have not changed since they were last read are not read again."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from runner.dataset.buckets import Size
from runner.dataset.caption_files import (
    Entries,
    link_problem,
    list_folder,
    normal,
    note_captions,
    note_unused,
    pair,
    read_caption,
)
from runner.dataset.companions import Companions, Controls
from runner.dataset.encodings import Mask
from runner.dataset.folders import NOUNS, Folder, SourceProblem
from runner.dataset.known import Progress, known_sequence, read_anew
from runner.dataset.notes import Notes
from runner.dataset.probe import probe_image, probe_video
from runner.media import endings, is_media
from runner.pictures import ANIMATED, DEEP, GROUND, TRANSPARENT
from runner.store.index import FileContent, Index


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

    def parted(self) -> tuple[Scan, Scan]:
        """What the sources hold, and what held_out.path does."""
        own, apart = Scan([], []), Scan([], [])
        for item in self.items:
            (own if item.folder.number >= 0 else apart).items.append(item)
        for bad in self.bad:
            (own if bad.number >= 0 else apart).bad.append(bad)
        return own, apart


def scan(folders: Sequence[Folder], index: Index, progress: Progress | None = None, notes: Notes | None = None) -> Scan:
    """Lists and reads all folders of a run; what is left out or read in a way to be known goes to `notes`. Raises
    `SourceProblem` where a folder has no pictures at all."""
    found = Scan([], [])
    shared = _Shared(folders, index, progress, Notes() if notes is None else notes)
    for folder in folders:
        reading = _Reading(folder, shared)
        count = reading.read()
        found.items.extend(reading.items)
        found.bad.extend(reading.bad)
        if count == 0:
            raise SourceProblem(folder.number, f"no {folder.noun} in {folder.path}")
    for companions in shared.companions.values():
        companions.note(shared.notes)
    return found


class _Shared:
    """What the readings of all folders have together."""

    def __init__(self, folders: Sequence[Folder], index: Index, progress: Progress | None, notes: Notes) -> None:
        self.index, self.progress, self.notes = index, progress, notes
        self.named = {(folder.path, folder.kind) for folder in folders}
        """One folder may be a source of pictures and one of videos."""
        self.companions: dict[tuple[Path, bool], Companions] = {}

    def beside(self, folder: Folder, place: Path | None, are_masks: bool) -> Companions | None:
        """The masks or control images of a folder, listed once for all that have them there."""
        if place is not None and (place, are_masks) not in self.companions:
            try:
                self.companions[place, are_masks] = Companions(place, self.index, are_masks)
            except OSError as error:
                raise SourceProblem(folder.number, f"{error.filename} cannot be read: {error.strerror}") from None
        return None if place is None else self.companions[place, are_masks]


class _Reading:
    """Reads one folder."""

    def __init__(self, folder: Folder, shared: _Shared) -> None:
        self.folder, self.shared = folder, shared
        self.index, self.progress, self.notes = shared.index, shared.progress, shared.notes
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
        masks = self.shared.beside(folder, folder.masks, True)
        controls = Controls(folder, self.index, self.shared.beside(folder, folder.controls, False))
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
            found: tuple[Mask, ...] = ()
            if masks is not None:
                own_mask, missing = masks.of(name)
                mask, problem = next(iter(own_mask), None), problem or missing
            if controls.wanted:
                found, missing = controls.of(name)
                problem = problem or missing
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
            where = "no caption file" if self.folder.listing is None else "no caption in the list"
            self.notes.add(
                f"~{self.folder.noun} ~have {where} and ~use `{self.folder.class_tokens}`",
                f"a caption lies beside its picture, as NAME{self.extension}"
                if self.folder.listing is None
                else "give each a caption there",
                without,
                of=len(self.items),
            )
        if not self.folder.whole_captions:
            note_captions(texts, self.folder.options.enable_wildcard, self.notes)
        self.notes.add(
            "~captions ~are empty, and what ~they ~belong to is trained without words",
            "write ~them; or delete the ~files, so that class_tokens are used",
            empty,
        )
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
        other = "video" if folder.kind == "image" else "image"
        others = [name for name in pairing.rest if is_media(name, other)]
        if others:  # a text file of the same name is theirs
            theirs = {normal(os.path.splitext(name)[0]) for name in others}
            pairing.orphans = [name for name in pairing.orphans if normal(os.path.splitext(name)[0]) not in theirs]
        note_unused(pairing, label, self.extension, self.notes)
        if (folder.path, other) not in self.shared.named:
            self.notes.add(
                f"~{NOUNS[other]} ~lie among {folder.noun} and ~are not used",
                f'name the folder again as a source of kind = "{other}"',
                [f"{label}/{name}" for name in others],
            )
        self._note_others(
            entries,
            sorted(set(pairing.rest).difference(others), key=lambda name: (os.path.splitext(name)[1], name)),
            named_so,
        )
        return self._followed([*pictures, *named_so], pairing.captions, entries.links)

    def _note_others(self, entries: Entries, rest: list[str], named_so: list[str]) -> None:
        """What lies in the folder and is neither a picture nor a text; `named_so`: folders that are named like pictures."""
        folder, label = self.folder, self.folder.label
        self.notes.add(
            f"~files ~are neither {folder.noun} nor captions and ~are not used",
            f"{folder.noun} end in {endings(folder.kind)}",
            [f"{label}/{name}" for name in rest],
        )
        self.notes.add(
            f"~folders ~lie among {folder.noun} and ~are not read",
            "name each as a source of its own",
            [f"{label}/{name}" for name in entries.folders if name not in named_so],
        )
        for name in entries.unreadable:
            if is_media(name, folder.kind):
                self._refuse(name, "has a name that is not UTF-8; rename it")
        self.notes.add(
            "~names ~are not UTF-8, and what ~they ~name is left out",
            "rename ~them",
            [f"{label}/{name}" for name in entries.unreadable if not is_media(name, folder.kind)],
        )

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
            name
            for name in pictures
            if name not in known and name not in folders and not (elsewhere and os.path.isabs(name))
        ]
        known.update(read_anew(self.location, own, index, probe, self.progress))
        for place, names in elsewhere.items():
            there = index.unchanged(place, names)
            there.update(read_anew(place, [name for name in names if name not in there], index, probe, self.progress))
            known.update({os.path.join(place, name): content for name, content in there.items()})
        known.update({name: known_sequence(os.path.join(self.location, name), index) for name in folders})
        texts = [name for name in captions if name not in known]
        known.update(read_anew(self.location, texts, index, read_caption, None))
        return known


def _note_media(noun: str, items: list[Item], notes: Notes) -> None:
    """What is left of pictures and videos that hold more than is trained on."""
    told = [item for item in items if item.facts]
    notes.add(
        "~pictures ~have several frames or pages; the first is used",
        "save what else is wanted as pictures of their own, or as videos where the model trains on them",
        sorted(item.name for item in told if ANIMATED in item.facts),
    )
    notes.add(
        "~pictures ~have grey of more than 8 bits, which is scaled",
        "save ~them in 8 bits to say what is white",
        sorted(item.name for item in told if DEEP in item.facts.split()),
    )
    notes.add(
        f"~{noun} ~have transparent pixels; {GROUND} stands behind them",
        "alpha_mask = true trains only on what is opaque; for another ground, paint it"
        if noun == "pictures"
        else "for another ground, paint it",
        sorted(item.name for item in told if TRANSPARENT in item.facts and not (item.mask and item.mask.path is None)),
    )
