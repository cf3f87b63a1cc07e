"""Reads a picture or video once: its digest, its upright size and facts, or why it cannot be decoded."""

from __future__ import annotations

import hashlib
from pathlib import Path

from runner.dataset import frames
from runner.files import open_regular, read_bytes
from runner.pictures import MOST_BYTES, MissingDecoder, probe_picture
from runner.store.index import FileContent


def probe_image(path: Path) -> FileContent:
    """Decodes the whole picture, so that a truncated one is found before training; the index remembers the result."""
    try:
        content = read_bytes(path, MOST_BYTES)
    except OSError as error:
        return FileContent("", problem=f"cannot be read: {error.strerror}")
    digest = hashlib.sha256(content).hexdigest()
    try:
        size, facts = probe_picture(content)
    except MissingDecoder as error:  # no digest: it is looked at again, as the package may come
        return FileContent("", problem=f"cannot be read: {error.strerror}")
    except OSError as error:
        return FileContent(digest, problem=f"cannot be decoded: {error.strerror}")
    return FileContent(digest, *size, facts=facts)


def probe_video(path: Path) -> FileContent:
    """Decodes the whole video and counts its frames (`text`). One that is cut off or damaged is not used."""
    try:
        with open_regular(path, frames.MOST_BYTES) as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            found = frames.read_video(stream, str(path))
    except OSError as error:
        return FileContent("", problem=f"cannot be read: {error.strerror}")
    except frames.UnusableVideo as problem:
        return FileContent(digest, problem=str(problem))
    return FileContent(digest, *found.size, str(found.frames), facts=" ".join(found.words))
