"""Pictures that belong to others by their names, in a folder of their own: masks and control images; torch-free."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from pathlib import Path

from runner.dataset.caption_files import list_folder, normal
from runner.dataset.encodings import Mask
from runner.dataset.folders import Folder
from runner.dataset.known import known_pictures
from runner.dataset.metadata import control_problem
from runner.dataset.notes import Notes
from runner.media import is_media
from runner.pictures import TRANSPARENT, decoding
from runner.store.index import Index

_NUMBERED = re.compile(r"(.*)_([0-9]{1,9})", re.DOTALL)


class Companions:
    """The masks, or the control images, of a folder. Names are compared without their endings, in Unicode NFC."""

    def __init__(self, folder: Path, index: Index, are_masks: bool) -> None:
        """Of masks transparency does not count, of control images it is a mask of their own. Raises `OSError`."""
        self.folder, self.noun = folder, "mask" if are_masks else "control image"
        self.names = [name for name in list_folder(folder).files if is_media(name, "image")]
        known = known_pictures(str(folder), self.names, index)
        self.transparent = [name for name in self.names if TRANSPARENT in known[name].facts]
        self.found: dict[str, Mask] = {}
        """Name without its ending → picture."""
        self.broken: dict[str, str] = {}
        self.numbered: dict[str, list[tuple[int, str]]] = defaultdict(list)
        """`name` → the numbers and names of `name_0`, `name_1` …"""
        self.second: list[str] = []
        self._used: set[str] = set()
        for name in reversed(self.names):
            stem, content = normal(os.path.splitext(name)[0]), known[name]
            if stem in self.found or stem in self.broken:
                self.second.append(name)
                continue
            if content.problem is None:
                size = content.width, content.height
                self.found[stem] = Mask(
                    f"{folder}/{name}", content.digest, decoding(content.facts, not are_masks), size
                )
            else:
                self.broken[stem] = f"{name} in {folder} {content.problem}"
            match = _NUMBERED.fullmatch(stem)
            if match is not None:
                self.numbered[match.group(1)].append((int(match.group(2)), stem))

    def of(self, name: str) -> tuple[tuple[Mask, ...], str | None]:
        """(the picture of `name`'s own name, or of control images name_0, name_1 … in the order of their numbers; why there
        is none)."""
        stem = normal(os.path.splitext(os.path.basename(name))[0])
        several = [own for _, own in sorted(self.numbered.get(stem, []))] if self.noun != "mask" else []
        stems = [stem] if stem in self.found or stem in self.broken else several
        self._used.update(stems)
        broken = next((own for own in stems if own in self.broken), None)
        if broken is not None:
            return (), f"has a {self.noun} that cannot be used: {self.broken[broken]}"
        found = tuple(self.found[own] for own in stems)
        return found, None if found else f"has no {self.noun} in {self.folder}"

    def note(self, notes: Notes) -> None:
        """Says what of the folder is not used; once all that use it have been read."""
        folder = self.folder.name
        if self.noun == "mask":
            notes.add(
                "~masks ~have transparent pixels, which do not count",
                "paint those white where they should",
                [f"{folder}/{name}" for name in self.transparent],
            )
        plural = "~masks" if self.noun == "mask" else "control ~images"
        notes.add(
            f"{plural} ~have the name of another with another ending, and ~are not used",
            "keep one of each name",
            [f"{folder}/{name}" for name in sorted(self.second)],
        )
        unused = [name for name in self.names if normal(os.path.splitext(name)[0]) not in self._used]
        notes.add(
            f"{plural} ~belong to nothing that is trained on, and ~are not used",
            "give each the name of its picture or video",
            [f"{folder}/{name}" for name in unused if name not in self.second],
            of=len(self.names) if unused else None,
        )


class Controls:
    """The control images of a folder's pictures, by the same names or by its list."""

    def __init__(self, folder: Folder, index: Index, companions: Companions | None) -> None:
        self.folder, self.index, self.companions = folder, index, companions
        listed = folder.listing is not None and any(entry.controls for entry in folder.listing.values())
        self.wanted = companions is not None or listed

    def of(self, name: str) -> tuple[tuple[Mask, ...], str | None]:
        """(`name`'s control images; why there is none)."""
        if self.folder.listing is not None and self.folder.listing[name].controls:
            return self._listed(self.folder.listing[name].controls)
        return ((), "has no control image in its list") if self.companions is None else self.companions.of(name)

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
            size = content.width, content.height
            found.append(Mask(f"{place}/{last}", content.digest, decoding(content.facts, masked=True), size))
        return tuple(found), None
