"""Where things lie in a store, and how a store is found."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from runner.atomic import TEMPORARY, CannotWrite, remove, sweep_tree
from runner.errors import Invalid, RunFailed
from runner.files import name_problem
from runner.records import DamagedRecord, Maybe, read_record, said, write_record
from runner.store.index import Index, Stamp

ENVIRONMENT = "RUNNER_STORE"
FOLDER = ".runner"
EXTENSIONS = {
    "latents": ".safetensors",
    "text": ".safetensors",
    "samples": ".png",
    "videos": ".mp4",
    "settings": ".json",
    "scores": ".json",
}

RUN = {
    "file": str,
    "output_dir": str,
    "name": str,
    "fingerprints": {str: str},
    "shown": Maybe({str: str}),
    "steps": Maybe(int),
    "complete": Maybe(bool),
    "settings": Maybe([str]),
}
"""What a run's record must have."""


def find_store(folder: Path) -> Store:
    """The store of a run.toml in `folder`: $RUNNER_STORE, else the nearest `.runner` upwards, else a new one there."""
    given = os.environ.get(ENVIRONMENT)
    if given:
        try:
            return Store(Path(given).expanduser().absolute())
        except RuntimeError:  # ~name of nobody
            raise Invalid(f"{ENVIRONMENT}={given}: there is no such home folder", hint="name a folder") from None
    folder = folder.absolute()
    for candidate in (folder, *folder.parents):
        if (candidate / FOLDER).is_dir():
            return Store(candidate / FOLDER)
    return Store(folder / FOLDER)


@dataclass(frozen=True)
class Store:
    """One store's folder."""

    root: Path

    @cached_property
    def index(self) -> Index:
        try:
            return Index(self.root / "index.sqlite", self._item_files)
        except CannotWrite as error:
            raise RunFailed(
                f"the store {self.root} cannot be written: {error.strerror}",
                hint=f"set {ENVIRONMENT} to a folder that can",
            ) from None

    @cached_property
    def checked(self) -> dict[str, dict[str, Stamp]]:
        """Kind → item whose digest was checked in this process → what its file was then."""
        return {kind: {} for kind in EXTENSIONS}

    def item(self, kind: str, key: str) -> Path:
        """The file of one encoded item, picture or score."""
        return self.root / "items" / kind / key[:2] / (key + EXTENSIONS[kind])

    def _item_files(self) -> Iterator[tuple[str, str, int]]:
        """(kind, key, size) of every item that is there."""
        for kind, extension in EXTENSIONS.items():
            for folder in _folders(self.root / "items" / kind):
                for entry in os.scandir(folder):
                    stem, dot, rest = entry.name.partition(".")
                    if stem and dot + rest == extension and entry.is_file():
                        yield kind, stem, entry.stat().st_size

    def tidy(self) -> None:
        """Deletes what killed processes left unfinished, and folders where items belong. A live process's work stays."""
        sweep_tree(self.root)
        places = [folder for kind in EXTENSIONS for folder in _folders(self.root / "items" / kind)]
        for folder in (*places, self.root / "runs"):
            for entry in os.scandir(folder) if folder.is_dir() else ():
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(TEMPORARY):
                    said.warning("%s is a folder where a file belongs; it is deleted", entry.path)
                    remove(Path(entry.path))

    def index_existing(self, kind: str, keys: Iterable[str]) -> None:
        """Adds files to the index that are there but not in it: a kill may come between writing one and noting it."""
        present = self.index.item_keys(kind)
        found = [(key, self.item(kind, key)) for key in keys if key not in present]
        self.index.add_items(kind, [(key, file.stat().st_size) for key, file in found if file.is_file()])

    def artifact(self, kind: str, fingerprint: str) -> Path:
        """The folder of a finished stage."""
        return self.root / "artifacts" / kind / fingerprint

    def workspace(self, kind: str, fingerprint: str) -> Path:
        """The folder of a stage in progress; it survives a kill and is the only place where a resume looks."""
        return self.root / "work" / kind / fingerprint

    def artifacts(self, kind: str) -> Iterator[Path]:
        return _folders(self.root / "artifacts" / kind)

    def workspaces(self, kind: str) -> Iterator[Path]:
        return _folders(self.root / "work" / kind)

    def lock_file(self, name: str) -> Path:
        return self.root / "locks" / f"{name}.lock"

    # The registry of runs: what gc must keep.

    def portable(self, path: Path) -> str:
        """How a record names a path: relative to the folder that holds the store, so that both can be moved together."""
        path, home = (Path(os.path.normpath(place.absolute())) for place in (path, self.root.parent))
        return path.relative_to(home).as_posix() if path.is_relative_to(home) else str(path)

    def path_of(self, portable: str) -> Path:
        """The path behind a portable name."""
        return self.root.parent / portable

    def run_id(self, output_dir: Path) -> str:
        """A short name for a run, from where its folder is."""
        return hashlib.sha256(self.portable(output_dir).encode()).hexdigest()[:16]

    def run_lock(self, output_dir: Path) -> Path:
        """The lock that a process holds while it works on a run."""
        return self.lock_file(f"run-{self.run_id(output_dir)}")

    def run_record(self, output_dir: Path) -> Path:
        return self.root / "runs" / f"{self.run_id(output_dir)}.json"

    def register(self, output_dir: Path, record: dict[str, Any]) -> None:
        """`record` has the run's `file` and `output_dir` as portable names."""
        write_record(self.run_record(output_dir), record)

    def registry(self) -> tuple[list[tuple[Path, dict[str, Any]]], list[DamagedRecord]]:
        """(file, record) of each run that uses this store; and the records that are damaged."""
        folder = self.root / "runs"
        found: list[tuple[Path, dict[str, Any]]] = []
        damaged: list[DamagedRecord] = []
        for file in sorted(folder.glob("*.json")) if folder.is_dir() else []:
            try:
                record = read_record(file, RUN)
            except DamagedRecord as error:
                damaged.append(error)
                continue
            if record is None:
                continue
            problems = {name: name_problem(str(self.path_of(record[name]))) for name in ("file", "output_dir")}
            wrong = next((f"{name}: {problem}" for name, problem in problems.items() if problem), None)
            if wrong is None:
                found.append((file, record))
            else:
                damaged.append(DamagedRecord(file, wrong))
        return found, damaged


def _folders(parent: Path) -> Iterator[Path]:
    if parent.is_dir():
        yield from (entry for entry in sorted(parent.iterdir()) if entry.is_dir() and not entry.name.startswith("."))
