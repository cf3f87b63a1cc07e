"""Dataset files of other tools, used as they are: Kohya's (`[general]`, `[[datasets]]`, `[[datasets.subsets]]`; TOML or JSON)
and musubi-tuner's of pictures. Each key is translated or refused by name. Torch-free.

A key is looked for in the subset, then in its dataset, then in [general], then in run.toml's [dataset], then it has the
default of the tool.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli
from pydantic import ValidationError

from runner.config.diagnose import sentence
from runner.config.locate import Path as KeyPath
from runner.config.source import Source as Document
from runner.config.toml import MOST_DEPTH, check_parts, depth
from runner.dataset.caption_files import is_text
from runner.dataset.folders import Folder, SourceProblem, source_folders
from runner.dataset.foreign_files import recognised, recognised_text
from runner.dataset.notes import Notes
from runner.errors import Diagnostic, InvalidConfig, Place
from runner.files import MOST_TEXT_BYTES, parsing, read_bytes, reason, resolve_path, shown_path
from schemas.dataset import Buckets, Dataset, ItemOptions, Source

_ITEM = {
    "resolution",
    "batch_size",
    "shuffle_caption",
    "caption_separator",
    "keep_tokens",
    "keep_tokens_separator",
    "secondary_separator",
    "enable_wildcard",
    "color_aug",
    "flip_aug",
    "face_crop_aug_range",
    "random_crop",
    "caption_prefix",
    "caption_suffix",
    "token_warmup_min",
    "token_warmup_step",
    "caption_dropout_rate",
    "caption_dropout_every_n_epochs",
    "caption_tag_dropout_rate",
    "caption_extension",
    "alpha_mask",
}
"""Keys with our own names."""
_SOURCE = {
    "metadata_file": "path",
    "image_jsonl_file": "path",
    "video_jsonl_file": "path",
    "image_dir": "path",
    "image_directory": "path",
    "video_directory": "path",
    "control_directory": "control_path",
    "num_repeats": "repeats",
    "class_tokens": "class_tokens",
    "is_reg": "regularization",
    "conditioning_data_dir": "mask_path",
}
DEFAULT_WINDOW = 9
_PICTURES = tuple(name for name, own in _SOURCE.items() if own == "path")
"""Keys that name the pictures; the first that is given does."""
_CLIPS = {
    name: name
    for name in ("target_frames", "frame_extraction", "frame_stride", "frame_sample", "max_frames", "source_fps")
}
_ONE_FRAME = {
    "fp_1f_clean_indices": "clean_indices",
    "fp_1f_target_index": "target_index",
    "fp_1f_no_post": "no_post",
    "fp_1f_no_2x": "no_2x",
    "fp_1f_no_4x": "no_4x",
}
"""musubi-tuner's keys of one-frame training; the last two are options of its caching script."""
_BUCKETS = {
    "enable_bucket": "enabled",
    "min_bucket_reso": "min_size",
    "max_bucket_reso": "max_size",
    "bucket_reso_steps": "step",
    "bucket_no_upscale": "no_upscale",
}
_KOHYA_DEFAULTS: dict[str, Any] = {
    "enable_bucket": False,
    "min_bucket_reso": 256,
    "max_bucket_reso": 1024,
    "caption_extension": ".caption",
}
_IDLE = {
    "cache_info": "nothing is needed: what was read is remembered",
    "cache_directory": "caches lie in the store, keyed by content",
    "debug_dataset": "look at the plan",
}
_REFUSED = {
    "custom_attributes": "only scripts of one's own read them",
    "validation_seed": "held-out items are chosen by run.seed",
    "num_timestep_buckets": "timesteps are drawn from run.seed",
}
_ONE_VALUE: dict[str, tuple[Any, ...]] = {
    "network_multiplier": (1, 1.0),
    "resize_interpolation": ("lanczos",),
    "skip_image_resolution": (None,),
    "multiple_target": (False,),
    "no_resize_control": (False,),
    "control_resolution": (None,),
}
_KNOWN = (*_ITEM, *_SOURCE, *_CLIPS, *_ONE_FRAME, *_BUCKETS, "fp_latent_window_size", "validation_split")
_MUSUBI_DEFAULTS: dict[str, Any] = {"enable_bucket": False}


@dataclass(frozen=True)
class DatasetFile:
    """What a dataset file says."""

    folders: list[Folder]
    warnings: list[Diagnostic]


def read_dataset_file(file: Path, dataset: Dataset, run: Document, notes: Notes | None = None) -> DatasetFile:
    """Raises `InvalidConfig` with every finding; places are in the dataset file, and in run.toml for keys given twice."""
    return _Reading(file, dataset, run, Notes() if notes is None else notes).read()


class _Reading:
    def __init__(self, file: Path, dataset: Dataset, run: Document, notes: Notes) -> None:
        self.file, self.dataset, self.run, self.notes = file, dataset, run, notes
        self.findings: list[Diagnostic] = []
        self.warnings: list[Diagnostic] = []
        self.document = _parse(file)

    def read(self) -> DatasetFile:
        content = self.document.document
        self._sections(content)
        folders = [
            folder for number, levels in enumerate(self._subsets(content)) for folder in self._folders(number, levels)
        ]
        if self.findings:
            raise InvalidConfig([*self.findings, *self.warnings])
        if not folders:
            raise InvalidConfig([Diagnostic(f"{self.file.name} has no subsets", self.document.file_place())])
        return DatasetFile(folders, self.warnings)

    def _sections(self, content: Mapping[str, Any]) -> None:
        for name, value in content.items():
            if name not in ("general", "datasets"):
                self._error(
                    (name,), f"unknown section `{name}`", "there are [general], [[datasets]] and [[datasets.subsets]]"
                )
            elif not isinstance(value, dict if name == "general" else list):
                self._error((name,), f"`{name}` must be {'a table' if name == 'general' else 'an array of tables'}")

    def _subsets(self, content: Mapping[str, Any]) -> Iterator[list[tuple[KeyPath, Mapping[str, Any]]]]:
        """The tables of each subset, the nearest first."""
        general = content.get("general") or {}
        datasets = content.get("datasets") or []
        if not isinstance(general, dict) or not isinstance(datasets, list):
            return
        for number, dataset in enumerate(datasets):
            if not isinstance(dataset, dict):
                self._error(("datasets", number), "a dataset must be a table")
                continue
            outer: list[tuple[KeyPath, Mapping[str, Any]]] = [(("datasets", number), dataset), (("general",), general)]
            subsets = dataset.get("subsets")
            if subsets is None:  # musubi-tuner's datasets have no subsets
                yield outer
            elif not isinstance(subsets, list):
                hint = "write [[datasets.subsets]], in two pairs of brackets"
                self._error(("datasets", number, "subsets"), "`subsets` must be an array of tables", hint)
            for place, subset in enumerate(subsets if isinstance(subsets, list) else []):
                if isinstance(subset, dict):
                    yield [(("datasets", number, "subsets", place), subset), *outer]
                else:
                    self._error(("datasets", number, "subsets", place), "a subset must be a table")

    def _folders(self, number: int, levels: list[tuple[KeyPath, Mapping[str, Any]]]) -> list[Folder]:
        values: dict[str, Any] = {}
        places: dict[str, KeyPath] = {}
        for path, table in reversed(levels):
            for name, value in table.items():
                if name != "subsets" and self._known((*path, name), name, value):
                    values[name], places[name] = value, (*path, name)
        twice = [name for name in values if name in _ITEM and self.run.value(("dataset", name)) is not None]
        for name in twice:
            both = (*self.run.key_places(("dataset", name)), *self.document.key_places(places[name]))
            self.findings.append(
                Diagnostic(f"`{name}` is given in [dataset] and in {self.file.name}", both, "keep one of them")
            )
        kohya = len(levels) == 3
        if kohya:
            values = {
                **_KOHYA_DEFAULTS,
                **{name: value for name in _KOHYA_DEFAULTS if (value := self.run.value(("dataset", name))) is not None},
                **values,
            }
        else:
            values = {**_MUSUBI_DEFAULTS, **values}
        given = [name for name in _PICTURES if name in values]
        if not given:
            self._error(levels[0][0], "it names no pictures", "give image_dir, image_directory or video_directory")
            return []
        if len(given) > 1 and given != ["metadata_file", "image_dir"]:
            listed = " and ".join(f"`{name}`" for name in given)
            self._error(places[given[-1]], f"{listed} of one dataset name its files twice", "make a dataset of each")
        before = len(self.findings)
        if any(name in values for name in ("video_directory", "video_jsonl_file")):
            values["kind"] = "video"
        self._one_frame(values)
        self._window(values, places)
        names = {**{name: name for name in (*_ITEM, "kind", "one_frame")}, **_SOURCE, **_CLIPS}
        source = self._validated(Source, values, names, places)
        buckets = self._validated(Buckets, values, _BUCKETS, places)
        if source is None or buckets is None or len(self.findings) > before:
            return []
        return [
            replace(
                folder, whole_captions=not kohya, held_out=values.get("validation_split")
            )  # musubi-tuner keeps all lines
            for folder in self._scan(number, source, buckets, values, places)
        ]

    def _scan(
        self, number: int, source: Source, buckets: Buckets, values: Mapping[str, Any], places: Mapping[str, KeyPath]
    ) -> list[Folder]:
        path = places[next(name for name in _PICTURES if name in values)]
        base = self.file.absolute().parent
        lists = ("metadata_file", "image_jsonl_file", "video_jsonl_file")
        listed = source.path in [values[name] for name in lists if name in values]
        images = resolve_path(str(values["image_dir"]), base) if listed and "image_dir" in values else None
        try:
            own = self.dataset.model_copy(update={"sources": [source]})
            found = source_folders(own, base, images, self.notes, named=False)
        except SourceProblem as problem:
            self._error(path, str(problem), problem.hint)
            return []
        if not listed:
            self._captions(found, path)
        return [replace(folder, number=number, buckets=buckets) for folder in found]

    def _one_frame(self, values: dict[str, Any]) -> None:
        """musubi-tuner's keys of one-frame training as ours."""
        given = {own: values.pop(name) for name, own in _ONE_FRAME.items() if name in values}
        if given:
            values["one_frame"] = given

    def _window(self, values: dict[str, Any], places: Mapping[str, KeyPath]) -> None:
        """The window stands in [model]; a dataset file may only say the same."""
        window = values.pop("fp_latent_window_size", None)
        own = self.run.value(("model", "latent_window_size")) or DEFAULT_WINDOW
        if window is not None and window != own:
            self._error(
                places["fp_latent_window_size"],
                f"`fp_latent_window_size` is {window!r}, model.latent_window_size is {own}",
                "say the same in run.toml",
            )

    def _captions(self, folders: list[Folder], path: KeyPath) -> None:
        """Kohya's default ending is `.caption`; most people's captions are .txt files. With class_tokens a note says so."""
        for folder in folders:
            extension = folder.options.caption_extension
            if folder.class_tokens is not None:
                continue
            if extension != ".txt" and any(folder.path.glob("*.txt")) and not any(folder.path.glob(f"*{extension}")):
                self.warnings.append(
                    Diagnostic(
                        f"captions end in {extension} (Kohya's default), but {folder.path} has only .txt files",
                        self.document.value_places(path),
                        'set caption_extension = ".txt" there',
                        "warning",
                    )
                )

    def _known(self, path: KeyPath, name: str, value: Any) -> bool:
        if name in _REFUSED:
            self._error(path, f"`{name}` is not used here: {_REFUSED[name]}", "take it out")
        elif name in _ONE_VALUE:
            if value not in _ONE_VALUE[name]:
                self._error(path, f"`{name}` can only be {_ONE_VALUE[name][0]!r} here", "take it out")
        elif name == "validation_split" and not (isinstance(value, (int, float)) and 0 <= value < 1):
            self._error(path, f"`validation_split` must be a number from 0 to below 1, not {value!r}")
        elif name not in _IDLE and name not in _KNOWN:
            near = difflib.get_close_matches(name, _KNOWN, 1, 0.75)
            hint = f"did you mean `{near[0]}`?" if near else f"keys are {', '.join(sorted(_KNOWN))}"
            self._error(path, f"unknown key `{name}`", hint)
        else:
            return name not in _IDLE
        return False

    def _validated(
        self, cls: type[Any], values: Mapping[str, Any], names: Mapping[str, str], places: Mapping[str, KeyPath]
    ) -> Any:
        ours: dict[str, Any] = {}
        theirs: dict[str, str] = {}
        for name, own in names.items():
            if name in values and (own != "path" or own not in ours):
                ours[own], theirs[own] = values[name], name
        if "face_crop_aug_range" in ours and isinstance(ours["face_crop_aug_range"], (list, tuple)):
            ours["face_crop_aug_range"] = [
                float(value) for value in ours["face_crop_aug_range"] if isinstance(value, (int, float))
            ]
        wrong = [own for own, value in ours.items() if not is_text(repr_of := str(value)) or "\x00" in repr_of]
        for own in wrong:
            name = theirs[own]
            self._error(
                places.get(name, ("datasets",)),
                f"`{name}` holds half a character (a lone surrogate) or a NUL character",
            )
        if wrong:
            return None
        try:
            return cls.model_validate_json(json.dumps(ours, default=str), strict=True)
        except ValidationError as error:
            for detail in error.errors():
                own = str(detail["loc"][0]) if detail["loc"] else next(iter(ours))
                name = theirs.get(own, own)
                why = sentence(detail).removeprefix("Value error, ")
                self._error(places.get(name, ("datasets",)), f"`{name}`: {why}, not {detail['input']!r}")
            return None

    def _error(self, path: KeyPath, message: str, hint: str | None = None) -> None:
        self.findings.append(Diagnostic(message, self.document.key_places(path), hint))


def _parse(file: Path) -> Document:
    """The parsed file with the places of its keys (none for JSON). Raises `InvalidConfig`."""
    is_json = file.suffix.lower() == ".json"

    def problem(message: str, hint: str | None = None, place: Place | None = None) -> InvalidConfig:
        return InvalidConfig([Diagnostic(message, (place or Place(file=file.name),), hint)])

    def unreadable(why: str) -> InvalidConfig:
        foreign = recognised_text(text)
        if foreign is not None:
            return problem(f"{file.name} is {foreign.what}", foreign.hint)
        return problem(f"{file.name} is no {'JSON' if is_json else 'TOML'}: {why}")

    try:
        text = read_bytes(file, MOST_TEXT_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise problem(f"{shown_path(file)} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise problem(f"{shown_path(file)} cannot be read: {reason(error)}") from None
    try:
        with parsing(unreadable):
            if not is_json:
                check_parts(text, file.name)
            content = json.loads(text) if is_json else _toml(text)
            json.dumps(content, default=str, ensure_ascii=False).encode("utf-8")  # whatever it says can be shown
            if depth(content) > MOST_DEPTH:
                raise RecursionError
    except _NoToml as error:
        if recognised_text(text) is not None:
            raise unreadable(error.msg) from None
        lines = text.replace("\r\n", "\n").split("\n")
        line = min(error.lineno, len(lines))
        raise problem(
            f"{file.name} is no TOML: {error.msg}",
            None,
            Place(file=file.name, line=line, column=error.colno, length=1, text=lines[line - 1]),
        ) from None
    foreign = recognised(content)
    if foreign is not None:
        raise problem(f"{file.name} is {foreign.what}", foreign.hint)
    if not isinstance(content, dict):
        raise problem(f"{file.name} holds no table")
    return Document(file=file, text="" if is_json else text, document=content)


class _NoToml(Exception):
    def __init__(self, error: tomli.TOMLDecodeError) -> None:
        super().__init__(error.msg)
        self.msg, self.lineno, self.colno = error.msg, error.lineno, error.colno


def _toml(text: str) -> dict[str, Any]:
    try:
        return tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise _NoToml(error) from None


def options_of(folders: list[Folder]) -> list[ItemOptions]:
    """The options of all folders, each once."""
    return list({id(folder.options): folder.options for folder in folders}.values())
