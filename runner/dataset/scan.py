"""Finds the pictures and captions of the sources. Files that have not changed since they were last read are not read again."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from runner.dataset.buckets import Size
from runner.dataset.encodings import Mask
from runner.dataset.metadata import METADATA_SUFFIXES, MetadataProblem, read_metadata
from runner.dataset.probe import IMAGE_EXTENSIONS, probe_caption, probe_image
from runner.families.locate import resolve_path
from runner.store.index import FileContent, Index, Stamp, stamp
from schemas.dataset import Buckets, Dataset, ItemOptions, Source

Progress = Callable[[int, int], None]
_REPEATS_IN_NAME = re.compile(r"(\d+)_(.*)")


class SourceProblem(Exception):
    """A source's folder is not usable. `number` is its place in [[dataset.sources]], -1 is held_out.path."""

    def __init__(self, number: int, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.number = number
        self.hint = hint


@dataclass(frozen=True)
class Folder:
    """One folder of pictures with everything its source says. `number` is the source's place in the file."""

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
    listing: Mapping[str, str] | None = None
    """Picture → caption, of a metadata file; else the folder's pictures with their caption files."""
    buckets: Buckets | None = None
    """Bucket settings of its own, of a dataset file."""


class Item(NamedTuple):
    """A usable picture with its caption's text as the file holds it. `name` is for people."""

    folder: Folder
    name: str
    path: str
    digest: str
    size: Size
    text: str
    mask: Mask | None = None


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


def effective_options(dataset: Dataset, source: Source | None) -> ItemOptions:
    """The item options of a source: what it sets itself, else what [dataset] says."""
    values = {name: getattr(dataset, name) for name in ItemOptions.model_fields}
    if source is not None:
        values |= {name: getattr(source, name) for name in source.model_fields_set if name in values}
    return ItemOptions.model_construct(**values)


def source_folders(dataset: Dataset, base: Path, images: Path | None = None) -> list[Folder]:
    """The folders of all sources; a folder of `N_name` folders is opened up. Raises `SourceProblem`.

    `images` is where the pictures of a list are; else beside it.
    """
    folders: list[Folder] = []
    for number, source in enumerate(dataset.sources):
        path = resolve_path(source.path, base)
        options = effective_options(dataset, source)
        masks = _mask_folder(number, source, base)
        if path.suffix.lower() in METADATA_SUFFIXES and path.is_file():
            place = images or path.parent
            try:
                listing = read_metadata(path, place)
            except MetadataProblem as problem:
                raise SourceProblem(number, str(problem), problem.hint) from None
            folders.append(
                Folder(
                    number, place, path.stem, source.repeats or 1, source.class_tokens, source.regularization,
                    source.weight, options, masks, listing,
                )
            )  # fmt: skip
            continue
        for place in _places(number, path):
            repeats, tokens = _from_name(place)
            folders.append(
                Folder(
                    number, place, place.name, source.repeats or repeats,
                    source.class_tokens if source.class_tokens is not None else tokens,
                    source.regularization, source.weight, options, masks,
                )
            )  # fmt: skip
    return folders


def _mask_folder(number: int, source: Source, base: Path) -> Path | None:
    if source.mask_path is None:
        return None
    masks = resolve_path(source.mask_path, base)
    if not masks.is_dir():
        raise SourceProblem(number, f"there is no folder of masks {masks}", _near_folder(masks))
    return masks


def held_out_folder(dataset: Dataset, base: Path) -> Folder | None:
    """The folder of held_out.path, where it is given."""
    if dataset.held_out is None or dataset.held_out.path is None:
        return None
    path = resolve_path(dataset.held_out.path, base)
    if not path.is_dir():
        raise SourceProblem(-1, f"there is no folder {path}")
    _, tokens = _from_name(path)
    return Folder(-1, path, path.name, 1, tokens, False, 1.0, effective_options(dataset, None))


def _places(number: int, path: Path) -> list[Path]:
    if not path.exists():
        raise SourceProblem(number, f"there is no folder {path}", _near_folder(path))
    if not path.is_dir():
        raise SourceProblem(number, f"{path} is a file; a source is a folder of pictures", f"name {path.parent}")
    entries = []
    try:
        for entry in os.scandir(path):
            if _is_image(entry.name):
                return [path]
            entries.append(entry)
    except OSError as error:
        raise SourceProblem(number, f"{path} cannot be read: {error.strerror}") from None
    entries.sort(key=lambda entry: entry.name)
    children = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    if not children:
        endings = sorted({os.path.splitext(entry.name)[1] or entry.name for entry in entries})
        held = f"it holds only {', '.join(endings[:6])}" if endings else "it is empty"
        wanted = " ".join(sorted(extension.lstrip(".") for extension in IMAGE_EXTENSIONS))
        raise SourceProblem(number, f"no pictures in {path}: {held}", f"pictures end in {wanted}")
    unnumbered = [name for name in children if not _REPEATS_IN_NAME.fullmatch(name)]
    if unnumbered:
        raise SourceProblem(
            number,
            f"no pictures in {path}, and its folder {unnumbered[0]!r} has no number of repeats in its name",
            f"name the folder with the pictures itself, or call it 1_{unnumbered[0]}",
        )
    return [path / name for name in children]


def _near_folder(path: Path) -> str | None:
    import difflib

    if not path.parent.is_dir():
        return f"{path.parent} does not exist either; paths are relative to run.toml's folder"
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], 1, 0.5)
    return f"did you mean {path.parent / near[0]}?" if near else None


def _from_name(path: Path) -> tuple[int, str | None]:
    match = _REPEATS_IN_NAME.fullmatch(path.name)
    if match is None or int(match.group(1)) < 1:
        return 1, None
    return int(match.group(1)), match.group(2).strip() or None


def _is_image(name: str) -> bool:
    return name[name.rfind(".") :].lower() in IMAGE_EXTENSIONS and not name.startswith(".")


def scan(folders: Iterable[Folder], index: Index, progress: Progress | None = None) -> Scan:
    """Lists and reads the folders. Raises `SourceProblem` where a folder has no pictures at all."""
    items: list[Item] = []
    bad: list[BadItem] = []
    for folder in folders:
        names = _scan_folder(folder, index, progress, items, bad)
        if names == 0:
            raise SourceProblem(folder.number, f"no pictures in {folder.path}")
    return Scan(items, bad)


def _scan_folder(folder: Folder, index: Index, progress: Progress | None, items: list[Item], bad: list[BadItem]) -> int:
    location, extension = str(folder.path), folder.options.caption_extension
    if folder.listing is not None:
        captions = dict.fromkeys(folder.listing, "")
        present: set[str] = set()
    else:
        listing = os.listdir(location)
        captions = {name: name[: name.rfind(".")] + extension for name in listing if _is_image(name)}
        present = set(captions.values()).intersection(listing)
    masks = _masks(folder, index) if folder.masks is not None else None
    known = index.unchanged(location, present.union(captions))
    known.update(_read_anew(location, [name for name in captions if name not in known], index, probe_image, progress))
    known.update(_read_anew(location, [name for name in present if name not in known], index, probe_caption, None))
    for name, caption_name in captions.items():
        picture, caption = known[name], known.get(caption_name)
        label = f"{folder.label}/{name}"
        text = folder.class_tokens if caption is None else caption.text
        if folder.listing is not None:
            text = folder.listing[name] or folder.class_tokens
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
        else:
            size = (picture.width, picture.height)
            items.append(Item(folder, label, f"{location}/{name}", picture.digest, size, text, mask))
    return len(captions)


def _masks(folder: Folder, index: Index) -> dict[str, Mask]:
    """Name without its ending → mask."""
    location = str(folder.masks)
    names = [name for name in os.listdir(location) if _is_image(name)]
    known = index.unchanged(location, names)
    known.update(_read_anew(location, [name for name in names if name not in known], index, probe_image, None))
    return {
        os.path.splitext(name)[0]: Mask(f"{location}/{name}", known[name].digest)
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
            fresh.append(entry)
            if progress is not None:
                progress(done, len(names))
            if len(fresh) >= 2000:
                index.put_files(location, fresh)
                fresh = []
    index.put_files(location, fresh)
    return found
