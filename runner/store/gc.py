"""Finds what no registered run needs. Roots are what each run last applied, and what its folder shows until that is done.

Both functions run under `runner.store.lock.alone`: what a run that is going on needs is not known before it ends.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from runner.atomic import remove
from runner.records import read_packed
from runner.store.index import ASIDE
from runner.store.published import Published
from runner.store.store import EXTENSIONS, Store


@dataclass(frozen=True)
class Entry:
    """A file, link or folder that can go."""

    kind: str
    path: Path
    size: int


@dataclass
class Garbage:
    """What can go, and runs that are no longer there."""

    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    gone_runs: list[Path] = field(default_factory=list)

    def by_kind(self) -> dict[str, list[Entry]]:
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.kind, []).append(entry)
        return found


def keys_files(record: Path) -> tuple[Path, Path]:
    """Beside a run's record: the keys of the items that it last applied, and of those that its folder shows until that is
    done."""
    return record.with_suffix(".keys.gz"), record.with_suffix(".shown.gz")


def collect_garbage(store: Store) -> Garbage:
    """Looks, deletes nothing. A run counts as gone when its run.toml and its folder are both gone."""
    garbage = Garbage()
    needed: dict[str, set[str]] = {kind: set() for kind in EXTENSIONS}
    kept: set[Path] = set()
    exports: set[str] = set()
    registered, damaged = store.registry()
    if damaged:
        garbage.notes += [f"the record of a run is damaged: {error.file} ({error})" for error in damaged]
        garbage.notes.append("nothing is deleted: apply those runs again, or delete the records of runs that are gone")
        return garbage
    for file, record in registered:
        output = store.path_of(record["output_dir"])
        if not store.path_of(record["file"]).exists() and not output.exists():
            garbage.notes.append(f"run {record['name']!r} is gone ({record['file']})")
            garbage.gone_runs.append(file)
            continue
        keys = _keys(file)
        if keys is None:
            garbage.notes.append(f"run {record['name']!r} has no list of what it needs; nothing is deleted")
            return Garbage(notes=garbage.notes)
        for kind, own in keys.items():
            needed.setdefault(kind, set()).update(own)
        for fingerprints in (record["fingerprints"], record.get("shown") or {}):
            for name, fingerprint in fingerprints.items():
                kept |= {store.artifact(name, fingerprint), store.workspace(name, fingerprint)}
        published = Published.sound(output)
        if published is None:
            garbage.notes.append(f"what run {record['name']!r} has published is not known; no export is deleted")
            exports |= {folder.name for folder in (store.root / "exports").glob("*")}
        else:
            exports |= _linked_exports(store, published)
    for kind in EXTENSIONS:
        for path in (store.root / "items" / kind).glob("*/*"):
            if path.stem not in needed[kind] or path.suffix != EXTENSIONS[kind]:
                garbage.entries.append(Entry(f"items: {kind}", path, _size(path)))
    for part in ("artifacts", "work"):
        for folder in sorted((store.root / part).glob("*/*")):
            if folder not in kept:
                garbage.entries.append(Entry(f"{part}: {folder.parent.name}", folder, _size(folder)))
    for folder in sorted((store.root / "exports").glob("*")):
        if folder.name not in exports:
            garbage.entries.append(Entry("exports", folder, _size(folder)))
    aside = store.root / ASIDE
    if aside.is_file():
        garbage.entries.append(Entry("damaged index", aside, aside.stat().st_size))
    return garbage


def delete_garbage(store: Store, garbage: Garbage) -> None:
    """Deletes it."""
    for entry in garbage.entries:
        remove(entry.path)
        if entry.kind.startswith("items: "):
            store.index.remove_item(entry.kind.removeprefix("items: "), entry.path.stem)
    for file in garbage.gone_runs:
        for path in (file, file.with_suffix(".items.gz"), *keys_files(file)):
            remove(path)


def _keys(file: Path) -> dict[str, list[str]] | None:
    """The keys of the items that a run needs, by kind; None where the list cannot be read."""
    found: dict[str, list[str]] = {}
    applied, shown = keys_files(file)
    for place in (applied, shown) if shown.exists() else (applied,):
        content = read_packed(place)
        if content is None or not all(isinstance(keys, list) for keys in content.values()):
            return None
        for kind, keys in content.items():
            found.setdefault(kind, []).extend(str(key) for key in keys)
    return found


def _linked_exports(store: Store, published: Published) -> set[str]:
    """Exports that the run's own files and publications come from."""
    found = set()
    root = store.root / "exports"
    for _, _, source in published.files.values():
        path = Path(source)
        if root in path.parents:
            found.add(path.relative_to(root).parts[0])
    return found


def _size(entry: Path) -> int:
    """Bytes of a file, or of all files in a folder; links count by themselves."""
    if entry.is_dir() and not entry.is_symlink():
        return sum(path.lstat().st_size for path in entry.rglob("*") if path.is_symlink() or path.is_file())
    return entry.lstat().st_size
