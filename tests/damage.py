"""Damages each file of a finished run's store and folder in turn, and sees that nothing breaks or changes.

    python -m tests.damage [FOLDER]

After each: plan, status, gc and report end with a result or an error that names the file, never a traceback; an apply
comes to the same bytes, or its error names what to delete, and after that is deleted it comes to them.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.commands import Said, said
from tests.support import Place, new_place, run_bytes

SETTINGS = {
    "training": {"max_train_steps": 4, "ema": {"decay": 0.9}, "checkpoints": {"every_n_steps": 2}},
    "selection": {
        "publish": [
            {"directory": "published", "mode": "copy"},
            {"directory": "linked", "which": "all", "mode": "symlink"},
        ]
    },
}


def flipped(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    if raw:
        raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "flip": flipped,
    "list": lambda file: file.write_bytes(b"[]"),
    "table": lambda file: file.write_bytes(b"{}"),
    "folder": as_folder,
    "gone": lambda file: file.unlink(),
}
COMMANDS = (("plan",), ("status", "."), ("gc", "."), ("report",))
LEAVES_NO_TRACE = ("locks/", ".holder", "-wal", "-shm")


def files_of(place: Place) -> list[Path]:
    """Every file of the store and of the run's folder, by its path."""
    found = [*(place.folder / ".runner").rglob("*"), *place.output.rglob("*"), *(place.folder / "published").rglob("*")]
    files = [path for path in sorted(found) if path.is_file() and not path.is_symlink()]
    return [path for path in files if not any(part in str(path) for part in LEAVES_NO_TRACE)]


def finished_run(folder: Path, model: Path) -> Place:
    """A small run with an average and publications, applied."""
    place = new_place(folder, model, pictures=6)
    place.write(SETTINGS)
    first = said(place, "apply", "--yes")
    assert first.code == 0, first.err
    return place


@contextmanager
def copied(place: Place, folder: Path) -> Iterator[Place]:
    """The run at another place, its hard links kept as they are."""
    shutil.rmtree(folder, ignore_errors=True)
    links: dict[int, Path] = {}

    def copy(source: str, target: str) -> None:
        inode = Path(source).stat().st_ino
        if inode in links:
            Path(target).hardlink_to(links[inode])
        else:
            shutil.copy2(source, target)
            links[inode] = Path(target)

    shutil.copytree(place.folder, folder, symlinks=True, copy_function=copy)
    yield Place(folder, place.base)
    shutil.rmtree(folder, ignore_errors=True)


def outcome(place: Place, expected: dict[str, bytes], file: Path) -> str:
    """What became of a damaged run: "same", or "named" where a person had to delete something."""
    for command in COMMANDS:
        check(said(place, *command), command)
    result = check(said(place, "apply", "--yes"), ("apply",))
    how = "same"
    if result.code != 0:
        named = [Path(path) for path in re.findall(r"(/\S+?)(?=[:;,]?\s)", result.err) if Path(path).exists()]
        named = [path for path in named if path == file or path in file.parents or file in path.parents]
        assert named, f"nothing to delete is named:\n{result.err}"
        shutil.rmtree(named[0]) if named[0].is_dir() else named[0].unlink()
        result = check(said(place, "apply", "--yes"), ("apply",))
        assert result.code == 0, result.err
        how = "named"
    ours = run_bytes(place.output)
    differing = [name for name in {*ours, *expected} if ours.get(name) != expected.get(name)]
    assert not differing, f"other bytes: {differing}\n{result.err}"
    published = {path.name for path in (place.folder / "published").iterdir()}
    assert published == {"t.safetensors"}, published
    best = (place.output / "best.safetensors").read_bytes()
    assert (place.folder / "published" / "t.safetensors").read_bytes() == best
    again = said(place, "plan", "--detailed-exitcode")
    assert again.code == 0, again.out
    return how


def check(result: Said, command: tuple[str, ...]) -> Said:
    assert "Traceback" not in result.err + result.out, f"{command}\n{result.err}"
    assert "bug in runner" not in result.err, f"{command}\n{result.err}"
    assert result.code in (0, 1, 2, 3), f"{command} {result.code}\n{result.err}"
    return result


def kinds(place: Place, files: list[Path]) -> dict[str, Path]:
    """One file of each kind: numbers and keys of names left out."""
    found: dict[str, Path] = {}
    for file in files:
        name = re.sub(r"[0-9a-f]{16,}", "KEY", file.relative_to(place.folder).as_posix())
        name = re.sub(r"/[0-9a-f]{2}/", "/", re.sub(r"[0-9]{8}", "N", name))
        found.setdefault(name, file)
    return found


def sweep(place: Place, folder: Path, files: list[Path], hows: list[str], stop: bool = True) -> Counter[str]:
    """Every file in every way; returns how often it ended how."""
    expected, counts = run_bytes(place.output), Counter[str]()
    for file in files:
        name = file.relative_to(place.folder)
        for how in hows:
            with copied(place, folder) as copy:
                DAMAGE[how](copy.folder / name)
                try:
                    ended = outcome(copy, expected, copy.folder / name)
                except AssertionError as error:
                    if stop:
                        raise AssertionError(f"{name} {how}: {error}") from None
                    ended = "FAILED"
                    print(f"{name} {how}: {str(error)[-1500:]}", flush=True)
            counts[ended] += 1
            print(f"{how:<8} {ended:<8} {name}", flush=True)
    return counts


def main() -> None:
    from runner.families.registry import family

    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    pytest.importorskip("torch")
    family("sd15").tiny(folder / "model")
    place = finished_run(folder / "place", folder / "model")
    every = files_of(place)
    chosen = list(kinds(place, every).values()) if "--kinds" in sys.argv else every
    print(sweep(place, folder / "copy", chosen, list(DAMAGE), stop=False))


if __name__ == "__main__":
    main()
