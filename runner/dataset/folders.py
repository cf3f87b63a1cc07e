"""The folders of a run's sources, with everything that their sources say."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from runner.config.schema import source_class
from runner.dataset.caption_files import Entries, is_text, list_folder, shown
from runner.dataset.clips import ClipOptions
from runner.dataset.metadata import METADATA_SUFFIXES, Listed, MetadataProblem, note_unlisted, read_metadata
from runner.dataset.notes import Notes
from runner.files import name_problem, near_name, resolve_path, shown_path
from runner.media import ENDINGS, endings, is_media
from schemas.dataset import Buckets, CommonSource, Dataset, ItemOptions, Source
from schemas.families.references import ControlSource

_REPEATS_IN_NAME = re.compile(r"([0-9]{1,9})_(.*)")
NOUNS = {"image": "pictures", "video": "videos"}


class SourceProblem(Exception):
    """A source's folder is not usable. `number` is its place in [[dataset.sources]], -1 is held_out.path."""

    def __init__(self, number: int, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.number = number
        self.hint = hint


@dataclass(frozen=True, kw_only=True)
class Folder:
    """One folder of pictures or videos with everything its source says. `number` is the source's place in the file."""

    number: int
    path: Path
    label: str
    repeats: int
    class_tokens: str | None
    regularization: bool
    weight: float
    options: ItemOptions
    masks: Path | None = None
    """A folder of masks of the same names."""
    listing: Mapping[str, Listed] | None = None
    """Picture or video → what a metadata file says of it; else the folder's files with their caption files."""
    buckets: Buckets | None = None
    """Bucket settings of its own, of a dataset file."""
    kind: str = "image"
    clips: ClipOptions | None = None
    """How clips are taken out of its videos."""
    controls: Path | None = None
    """A folder of control images of the same names."""
    own: Mapping[str, Any] = field(default_factory=dict)
    """What its source says by keys that only some families have."""
    whole_captions: bool = False
    """Captions are whole texts, not first lines."""
    held_out: float | None = None
    """The share of it that a dataset file holds out."""
    follow_links: bool = False
    """Whether captions and entries of lists may be symbolic links out of their folder."""
    entries: Entries | None = field(default=None, compare=False, repr=False)
    """What lies in it, where that was listed already."""

    @property
    def noun(self) -> str:
        return NOUNS[self.kind]


def effective_options(dataset: Dataset, source: Source | None) -> ItemOptions:
    """The item options of a source: what it sets itself, else what [dataset] says."""
    values = {name: getattr(dataset, name) for name in ItemOptions.model_fields}
    if source is not None:
        values |= {name: getattr(source, name) for name in source.model_fields_set if name in values}
    return ItemOptions.model_construct(**values)


def _own(source: Source) -> dict[str, Any]:
    """What a source says by keys that only some families have; what is unset is None."""
    common = {*CommonSource.model_fields, *ControlSource.model_fields}
    values = {name: getattr(source, name) for name in type(source).model_fields if name not in common}
    return {name: value for name, value in values.items() if value is not None}


def source_folders(
    dataset: Dataset,
    base: Path,
    images: Path | None = None,
    notes: Notes | None = None,
    named: bool = True,
    first: int = 0,
) -> list[Folder]:
    """The folders of all sources; a folder of `N_name` folders is opened up. Raises `SourceProblem`.

    `images` is where the pictures of a list are; else beside it. `named`: the name of a source's own folder tells its repeats.
    `first` is the first source's number.
    """
    folders: list[Folder] = []
    notes = Notes() if notes is None else notes
    left_out: list[str] = []
    for number, source in enumerate(dataset.sources, first):
        path = _resolved(number, source.path, base)
        options = effective_options(dataset, source)
        shared: dict[str, Any] = {
            "masks": _side_folder(number, source.mask_path, base, "masks"),
            "controls": _side_folder(number, source.control_path, base, "control images"),
            "kind": source.kind,
            "clips": _clip_options(source),
            "own": _own(source),
            "follow_links": dataset.follow_links,
            "regularization": source.regularization,
            "weight": source.weight,
            "options": options,
        }
        if path.suffix.lower() in METADATA_SUFFIXES and os.path.isfile(path):
            place = images or path.parent
            try:
                listing = read_metadata(path, place, source.kind, notes, dataset.follow_links)
                if images is not None:
                    note_unlisted(path.name, images, source.kind, listing, notes)
            except MetadataProblem as problem:
                raise SourceProblem(number, str(problem), problem.hint) from None
            folders.append(
                Folder(
                    number=number,
                    path=place,
                    label=path.stem,
                    repeats=source.repeats or 1,
                    class_tokens=source.class_tokens,
                    listing=listing,
                    **shared,
                )
            )
            continue
        for place, entries in _places(number, path, source.kind, notes, named):
            repeats, tokens = _from_name(place)
            if place == path and not named and repeats not in (None, 1):
                notes.add(
                    "~folders ~have a number in the name, which a dataset file does not read",
                    "set num_repeats there",
                    [place.name],
                )
            if place == path and not named:
                repeats = 1
            repeats = source.repeats or (1 if repeats is None else repeats)
            if repeats == 0:
                left_out.append(place.name)
                continue
            own = source.class_tokens if source.class_tokens is not None else tokens
            folders.append(
                Folder(
                    number=number,
                    path=place,
                    label=place.name,
                    repeats=repeats,
                    class_tokens=own,
                    entries=entries,
                    **shared,
                )
            )
    notes.add("~folders ~have 0 repeats in the name and ~are left out", "give ~them another number", left_out)
    if left_out and not folders:
        raise SourceProblem(
            0, f"the folder {left_out[0]} has 0 repeats in its name, and no other is left", "call it 1_…"
        )
    return folders


def _resolved(number: int, name: str, base: Path) -> Path:
    """A path of a source. Raises `SourceProblem` for one that no file can have."""
    path = resolve_path(name, base)
    problem = name_problem(str(path)) or (None if is_text(str(path)) else "it is not UTF-8")
    if problem is not None:
        raise SourceProblem(number, f"{shown_path(shown(str(path)))} is no path: {problem}")
    return path


_CLIP_KEYS = {
    "target_frames": "target_frames",
    "frame_extraction": "extraction",
    "frame_stride": "stride",
    "frame_sample": "sample",
    "max_frames": "max_frames",
    "source_fps": "source_fps",
}
"""A source's key → its name in `ClipOptions`."""


def _clip_options(source: Source) -> ClipOptions:
    values = {own: getattr(source, name) for name, own in _CLIP_KEYS.items()}
    return ClipOptions(**{**values, "target_frames": tuple(source.target_frames or (1,))})


def _side_folder(number: int, name: str | None, base: Path, what: str) -> Path | None:
    """A folder of masks or of control images."""
    if name is None:
        return None
    folder = _resolved(number, name, base)
    if not os.path.isdir(folder):
        raise SourceProblem(number, f"there is no folder of {what} {folder}", near_name(folder))
    return folder


def held_out_folders(dataset: Dataset, base: Path, folders: Sequence[Folder], notes: Notes) -> list[Folder]:
    """The folders of held_out.path, where it is given, with what it leaves open as in the first of `folders` of its kind.
    Raises `SourceProblem`."""
    held = dataset.held_out
    if held is None or held.path is None:
        return []
    kind_of_source = source_class()
    shared = set(kind_of_source.model_fields) - set(ItemOptions.model_fields) - {"path"}
    given = {name: getattr(held, name) for name in type(held).model_fields if name in shared & held.model_fields_set}
    alike = (
        folder for folder in folders if not folder.regularization and given.get("kind", folder.kind) == folder.kind
    )
    like = next(alike, None)
    kind = given.get("kind", like.kind if like is not None else "image")
    source = kind_of_source.model_construct(**{"path": held.path, **given, "kind": kind})
    found = source_folders(dataset.model_copy(update={"sources": [source]}), base, notes=notes, first=-1)
    options = effective_options(dataset, None) if like is None else like.options
    own = {name: value for name in ("resolution", "caption_extension") if (value := getattr(held, name)) is not None}
    found = [replace(folder, repeats=1, options=options.model_copy(update=own)) for folder in found]
    if like is None:
        return found
    clips = replace(
        like.clips or ClipOptions(),
        **{own: getattr(_clip_options(source), own) for name, own in _CLIP_KEYS.items() if name in given},
    )
    return [
        replace(
            folder,
            clips=clips,
            own={**like.own, **folder.own},
            buckets=like.buckets,
            class_tokens=folder.class_tokens if folder.class_tokens is not None else like.class_tokens,
        )
        for folder in found
    ]


def _places(number: int, path: Path, kind: str, notes: Notes, opens: bool = True) -> list[tuple[Path, Entries]]:
    """The folders with files of this kind: `path` itself, or the `N_name` folders in it, as Kohya's train_data_dir (not
    `opens`: only where there are none in `path`)."""
    noun = NOUNS[kind]
    if not os.path.exists(path):
        what = "list" if path.suffix.lower() in METADATA_SUFFIXES else "folder"
        raise SourceProblem(number, f"there is no {what} {path}", near_name(path))
    if not os.path.isdir(path):
        raise SourceProblem(
            number,
            f"{path} is a file; a source is a folder of {noun}",
            f"name {path.parent}, or a list that ends in .jsonl or .json",
        )
    own = _listed(number, path)
    if not own.folders and any(is_media(name, kind) for name in own.files):
        return [(path, own)]
    loose = [name for name in own.files if is_media(name, kind)]
    numbered = {name: _listed(number, path / name) for name in own.folders if _REPEATS_IN_NAME.fullmatch(name)}
    filled = {name: listed for name, listed in numbered.items() if any(is_media(file, kind) for file in listed.files)}
    if loose and (not filled or not opens or _REPEATS_IN_NAME.fullmatch(path.name)):
        return [(path, own)]
    if not own.folders:
        raise _nothing(number, path, kind, own)
    if not numbered:
        first = own.folders[0]
        raise SourceProblem(
            number,
            f"no {noun} in {path}, and its folder {first!r} has no number of repeats in its name",
            f"name the folder with the {noun} itself, or call it 1_{first}" + (_FRAMES if kind == "video" else ""),
        )
    if not filled:
        first = next(iter(numbered))
        raise _nothing(number, path / first, kind, numbered[first])
    beside = f"~{noun} ~lie beside folders with a number of repeats, which are trained instead, and ~are not used"
    notes.add(beside, "move ~them into a folder such as 1_name", [f"{path.name}/{name}" for name in loose])
    rest = [f"{path.name}/{name}" for name in own.files if name not in loose]
    notes.add(
        "~files ~lie beside folders with a number of repeats, and ~are not used", "move ~them into one of those", rest
    )
    others = [name for name in own.folders if name not in numbered]
    notes.add(
        "~folders ~have no number of repeats in the name and ~are left out",
        "rename ~them, as 1_name, or make each a source of its own",
        [f"{path.name}/{name}" for name in others],
    )
    empty = [f"{path.name}/{name}" for name in numbered if name not in filled]
    notes.add(f"~folders ~hold no {noun} and ~are left out", "fill or remove ~them", empty)
    unreadable = [f"{path.name}/{name}" for name in own.unreadable]
    notes.add("~names ~are not UTF-8, and what ~they ~name is left out", "rename ~them", unreadable)
    return [(path / name, listed) for name, listed in filled.items()]


_FRAMES = "; folders of frames are named in a .jsonl list, by video_path"


def _listed(number: int, path: Path) -> Entries:
    try:
        return list_folder(path)
    except OSError as error:
        raise SourceProblem(number, f"{path} cannot be read: {error.strerror}") from None


def _nothing(number: int, path: Path, kind: str, entries: Entries) -> SourceProblem:
    """A folder without any file of this kind."""
    noun = NOUNS[kind]
    held = sorted({os.path.splitext(name)[1] or name for name in entries.files})
    inside = [f"the folder {name!r}" for name in entries.folders[:3]]
    what = f"it holds only {', '.join([*held[:6], *inside])}" if held or inside else "it is empty"
    other = next((other for other in ENDINGS if other != kind and set(held) & ENDINGS[other]), None)
    hint = f"{noun} end in {endings(kind)}" + (f'; {NOUNS[other]} need kind = "{other}"' if other else "")
    return SourceProblem(number, f"no {noun} in {path}: {what}", hint + (_FRAMES if other == "image" else ""))


def _from_name(path: Path) -> tuple[int | None, str | None]:
    """(repeats, class tokens) that a folder's name tells."""
    match = _REPEATS_IN_NAME.fullmatch(path.name)
    if match is None:
        return None, None
    return int(match.group(1)), match.group(2).strip() or None
