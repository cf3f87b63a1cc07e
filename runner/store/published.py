"""What a run has written for people: its own folder's files and the published weights; so that a plan sees what is amiss."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from runner.files import name_problem
from runner.records import DamagedRecord, read_record, write_record

FILE = ".published.json"


@dataclass
class Published:
    """Path → (size, mtime_ns, digest of what it was made from) of each file that this run wrote."""

    fingerprint: str = ""
    files: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    intended: dict[str, str] = field(default_factory=dict)
    """Path → sha256 of what is about to be written there; tells our own file after a kill before it was noted."""

    @classmethod
    def read(cls, output_dir: Path) -> Published:
        """What was noted; nothing where there is no note, or a damaged one."""
        return cls.sound(output_dir) or cls()

    @classmethod
    def sound(cls, output_dir: Path) -> Published | None:
        """What was noted; None where the note is damaged."""
        try:
            content = read_record(output_dir / FILE, {"fingerprint": str, "files": dict, "intended": {str: str}})
            if content is None:
                return cls()
            files = {
                _absolute(path, output_dir): (
                    int(size),
                    int(time),
                    _absolute(made, output_dir) if "/" in made else made,
                )
                for path, (size, time, made) in content["files"].items()
            }
            intended = {_absolute(path, output_dir): str(digest) for path, digest in content["intended"].items()}
        except (DamagedRecord, ValueError, TypeError, OverflowError):
            return None
        if any(name_problem(path) is not None for path in (*files, *intended)):
            return None
        return cls(content["fingerprint"], files, intended)

    def write(self, output_dir: Path) -> None:
        files = {
            _relative(path, output_dir): (size, time, _relative(made, output_dir))
            for path, (size, time, made) in self.files.items()
        }
        intended = {_relative(path, output_dir): digest for path, digest in self.intended.items()}
        content = {"version": 1, "fingerprint": self.fingerprint, "files": files, "intended": intended}
        write_record(output_dir / FILE, content)

    def note(self, path: Path, made_from: str) -> None:
        """Remembers a file as it is now."""
        stat = path.stat()
        self.files[str(path)] = (stat.st_size, stat.st_mtime_ns, made_from)
        self.intended.pop(str(path), None)

    @classmethod
    def renew(cls, output_dir: Path, paths: Iterable[Path]) -> None:
        """Notes files of the run's folder that were written again, where they were noted before."""
        published = cls.read(output_dir)
        for path in paths:
            if str(path) in published.files:
                published.note(path, path.name)
        if published.files:
            published.write(output_dir)

    def is_ours(self, path: Path, made_from: str | None = None) -> bool:
        """Whether the file is still as this run wrote it (and from the same source)."""
        known = self.files.get(str(path))
        if known is None:
            return False
        try:
            stat = os.stat(path)
        except OSError:
            return False
        same = (stat.st_size, stat.st_mtime_ns) == known[:2]
        return same and (made_from is None or known[2] == made_from)


def _relative(path: str, output_dir: Path) -> str:
    """Relative to the run's folder where that can be said, so that a project can be moved."""
    try:
        return Path(os.path.relpath(path, output_dir)).as_posix() if os.path.isabs(path) else path
    except ValueError:  # another drive
        return path


def _absolute(name: str, output_dir: Path) -> str:
    return os.path.normpath(output_dir.absolute() / name)


def view_is_current(published: Published, fingerprint: str) -> str | None:
    """Why the files have to be written again; None where all are in place."""
    if not published.files:
        return "nothing is published yet"
    if published.fingerprint != fingerprint:
        return "the choice or [[selection.publish]] changed"
    for path in published.files:
        if not published.is_ours(Path(path)):
            return f"{path} is gone" if not os.path.exists(path) else f"{path} changed"
    return None
