"""The folders of a run's sources, with everything that their sources say."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runner.dataset.clips import ClipOptions
from runner.dataset.media import ENDINGS, is_media
from runner.dataset.metadata import METADATA_SUFFIXES, Listed, MetadataProblem, read_metadata
from runner.families.locate import resolve_path
from schemas.dataset import Buckets, Dataset, ItemOptions, OneFrame, Source

_REPEATS_IN_NAME = re.compile(r"(\d+)_(.*)")
_NOUNS = {"image": "pictures", "video": "videos"}


class SourceProblem(Exception):
    """A source's folder is not usable. `number` is its place in [[dataset.sources]], -1 is held_out.path."""

    def __init__(self, number: int, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.number = number
        self.hint = hint


@dataclass(frozen=True)
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
    one_frame: OneFrame | None = None

    @property
    def noun(self) -> str:
        return _NOUNS[self.kind]


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
        shared = {
            "masks": _side_folder(number, source.mask_path, base, "masks"),
            "controls": _side_folder(number, source.control_path, base, "control images"),
            "kind": source.kind, "clips": _clip_options(source), "one_frame": source.one_frame,
        }  # fmt: skip
        if path.suffix.lower() in METADATA_SUFFIXES and path.is_file():
            place = images or path.parent
            try:
                listing = read_metadata(path, place, source.kind)
            except MetadataProblem as problem:
                raise SourceProblem(number, str(problem), problem.hint) from None
            folders.append(
                Folder(
                    number, place, path.stem, source.repeats or 1, source.class_tokens, source.regularization,
                    source.weight, options, listing=listing, **shared,  # type: ignore[arg-type]
                )
            )  # fmt: skip
            continue
        for place in _places(number, path, source.kind):
            repeats, tokens = _from_name(place)
            folders.append(
                Folder(
                    number, place, place.name, source.repeats or repeats,
                    source.class_tokens if source.class_tokens is not None else tokens,
                    source.regularization, source.weight, options, **shared,  # type: ignore[arg-type]
                )
            )  # fmt: skip
    return folders


def _clip_options(source: Source) -> ClipOptions:
    return ClipOptions(
        tuple(source.target_frames or (1,)), source.frame_extraction, source.frame_stride, source.frame_sample,
        source.max_frames, source.source_fps,
    )  # fmt: skip


def _side_folder(number: int, name: str | None, base: Path, what: str) -> Path | None:
    """A folder of masks or of control images."""
    if name is None:
        return None
    folder = resolve_path(name, base)
    if not folder.is_dir():
        raise SourceProblem(number, f"there is no folder of {what} {folder}", _near_folder(folder))
    return folder


def held_out_folder(dataset: Dataset, base: Path) -> Folder | None:
    """The folder of held_out.path, where it is given."""
    if dataset.held_out is None or dataset.held_out.path is None:
        return None
    path = resolve_path(dataset.held_out.path, base)
    if not path.is_dir():
        raise SourceProblem(-1, f"there is no folder {path}")
    _, tokens = _from_name(path)
    return Folder(-1, path, path.name, 1, tokens, False, 1.0, effective_options(dataset, None))


def _places(number: int, path: Path, kind: str) -> list[Path]:
    noun = _NOUNS[kind]
    if not path.exists():
        raise SourceProblem(number, f"there is no folder {path}", _near_folder(path))
    if not path.is_dir():
        raise SourceProblem(number, f"{path} is a file; a source is a folder of {noun}", f"name {path.parent}")
    entries = []
    try:
        for entry in os.scandir(path):
            if is_media(entry.name, kind):
                return [path]
            entries.append(entry)
    except OSError as error:
        raise SourceProblem(number, f"{path} cannot be read: {error.strerror}") from None
    entries.sort(key=lambda entry: entry.name)
    children = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    if not children:
        endings = sorted({os.path.splitext(entry.name)[1] or entry.name for entry in entries})
        held = f"it holds only {', '.join(endings[:6])}" if endings else "it is empty"
        wanted = " ".join(sorted(extension.lstrip(".") for extension in ENDINGS[kind]))
        other = next((other for other in ENDINGS if other != kind and set(endings) & ENDINGS[other]), None)
        hint = f"{noun} end in {wanted}"
        raise SourceProblem(
            number, f"no {noun} in {path}: {held}", f'{hint}; {_NOUNS[other]} need kind = "{other}"' if other else hint
        )  # fmt: skip
    unnumbered = [name for name in children if not _REPEATS_IN_NAME.fullmatch(name)]
    if unnumbered:
        raise SourceProblem(
            number,
            f"no {noun} in {path}, and its folder {unnumbered[0]!r} has no number of repeats in its name",
            f"name the folder with the {noun} itself, or call it 1_{unnumbered[0]}",
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
