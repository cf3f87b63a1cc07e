"""Puts exports where other programs look for them; never over a file that this run did not write."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from runner.atomic import copy_file, make_folder, remove, sweep, temporary_for, writing
from runner.errors import RunFailed
from runner.files import file_digest
from runner.store.published import Published

_NO_LINKS = (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, None)
"""What file systems and systems without symbolic links say."""


@dataclass(frozen=True)
class Placed:
    """One published file or folder; `note` says where it is not what was asked for."""

    path: Path
    note: str | None = None


def place(source: Path, target: Path, mode: str, published: Published, output_dir: Path) -> Placed:
    """Publishes a file or a folder as a link or a copy. Raises `RunFailed` where something else is in the way."""
    if source.is_dir():
        return _place_folder(source, target, mode, published, output_dir)
    sweep(target.parent, target.name)
    if published.is_ours(target, str(source)) and target.is_symlink() == (mode == "symlink"):
        return Placed(target)
    _guard(source, target, published)
    make_folder(target.parent)
    published.intended[str(target)] = file_digest(source)
    published.write(output_dir)
    note = None
    if mode == "symlink" and not _link(source, target):
        note = f"{target}: symbolic links are not allowed here, a copy was made"
    if mode == "copy" or note:
        copy_file(source, target)
    published.note(target, str(source))
    return Placed(target, note)


def _place_folder(source: Path, target: Path, mode: str, published: Published, output_dir: Path) -> Placed:
    if mode == "symlink":
        if target.is_symlink() and target.resolve() == source.resolve():
            return Placed(target)
        if (target.exists() or target.is_symlink()) and not (target.is_symlink() and str(target) in published.files):
            raise RunFailed(f"{target} is there and was not written by this run", hint="move it, or publish elsewhere")
        make_folder(target.parent)
        if _link(source, target):
            published.note(target, str(source))
            return Placed(target)
    notes = [
        place(file, target / file.relative_to(source), "copy", published, output_dir).note
        for file in sorted(source.rglob("*"))
        if file.is_file()
    ]
    note = f"{target}: symbolic links are not allowed here, a copy was made" if mode == "symlink" else None
    return Placed(target, note or next((text for text in notes if text), None))


def _guard(source: Path, target: Path, published: Published) -> None:
    """A file in the way must be ours: as we noted it, or (after a kill before the note) exactly what we write."""
    if not target.exists() and not target.is_symlink():
        return
    if published.is_ours(target) or (target.is_symlink() and str(target) in published.files):
        return
    if target.is_symlink() and target.resolve() == source.resolve():
        return
    if target.is_file() and file_digest(target) in (file_digest(source), published.intended.get(str(target))):
        return
    raise RunFailed(
        f"{target} is there and was not written by this run; it is left as it is",
        hint="move it, or change directory or name in [[selection.publish]]",
    )


def _link(source: Path, target: Path) -> bool:
    """Whether a symbolic link could be made; False where they are not allowed."""
    temporary = temporary_for(target)
    try:
        with writing(target):
            remove(temporary)
            temporary.symlink_to(source.resolve(), target_is_directory=source.is_dir())
            os.replace(temporary, target)
    except NotImplementedError:
        return False
    except OSError as error:
        if temporary.is_symlink():
            temporary.unlink()
        if error.errno not in _NO_LINKS:
            raise
        return False
    return True
