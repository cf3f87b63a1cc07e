"""The folders that a run writes to: whether they can be, and that they lie apart from what it reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from runner.dataset.folders import Folder
from runner.files import resolve_path
from schemas import RunConfig

Key = tuple[str | int, ...]


class Report(Protocol):
    """Takes an error at a key of run.toml."""

    def __call__(self, key: Key, message: str, hint: str | None = None) -> None: ...


def check_writable(config: RunConfig, folder: Path, error: Report) -> None:
    for key, place in _written(config, folder):
        problem = _unwritable(place)
        if problem is not None:
            error(key, f"{place} cannot be written: {problem}", "choose another folder")


def check_apart(config: RunConfig, folder: Path, store: Path, sources: Sequence[Folder], error: Report) -> None:
    """What a run writes must not lie among what it reads, or the next plan would read it."""
    real = os.path.realpath
    read = {source.path for source in sources if source.listing is None}
    read |= {side for source in sources for side in (source.masks, source.controls) if side is not None}
    for key, place in _written(config, folder):
        written = real(place)
        if written in (real("/"), real(Path.home())):
            error(key, f"{place} is no folder for a run alone", "name a folder in it")
        elif key[0] == "run" and _inside(written, real(store)):
            error(key, f"{place} lies in the store {store}", "choose another folder")
        for path in sorted(read):
            if _inside(written, real(path)):
                what = f"{place} lies in the source {path}: what is written there would be read by the next plan"
                error(key, what, "choose a folder outside of it")
            elif key[0] == "run" and _inside(real(path), written):
                error(key, f"the source {path} lies in the run's folder {place}", "choose another folder")


def _written(config: RunConfig, folder: Path) -> list[tuple[Key, Path]]:
    """The folders that a run writes to, with their keys."""
    output = config.run.output_dir or f"runs/{config.run.name}"
    places: list[tuple[Key, Path]] = [(("run", "output_dir"), resolve_path(output, folder))]
    for index, publish in enumerate(config.selection.publish):
        places.append((("selection", "publish", index, "directory"), resolve_path(publish.directory, folder)))
    return places


def _inside(path: str, folder: str) -> bool:
    """Whether a path is a folder or lies in it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _unwritable(place: Path) -> str | None:
    """Why a folder cannot be made or written, as far as can be told without trying."""
    existing = place
    while not os.path.exists(existing):
        if existing.parent == existing:
            return "its root does not exist"
        existing = existing.parent
    if not existing.is_dir():
        return f"{existing} is a file"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"no permission to write in {existing}"
    try:
        read_only = bool(os.statvfs(existing).f_flag & os.ST_RDONLY)
    except (OSError, AttributeError):
        read_only = False
    return f"{existing} is on a read-only file system" if read_only else None
