"""Whether a sample of the store is what was written: a PNG has checksums of its own, and a video's poster has its files'."""

from __future__ import annotations

import hashlib
import json

from PIL import Image

from runner.records import said
from runner.store.run_folder import Shown, sample_files
from runner.store.store import Store

FILES = "runner-files"


def poster_of(mp4: bytes, settings: bytes) -> dict[str, str]:
    """The text chunk by which a video's poster knows its files."""
    digests = {"mp4": hashlib.sha256(mp4).hexdigest(), "json": hashlib.sha256(settings).hexdigest()}
    return {FILES: json.dumps(digests, sort_keys=True)}


def is_sound(store: Store, key: str, prompt: Shown) -> bool:
    """Whether a sample is there and whole; what is damaged is said, and made again."""
    file = store.item("samples", key)
    if not file.is_file():
        return False
    try:
        with Image.open(file, formats=("PNG",)) as picture:
            texts = picture.info
            picture.verify()
        if not prompt.is_video:
            return True
        digests = json.loads(texts[FILES])
        for part in sample_files(store, key, prompt):
            if hashlib.sha256(part.read_bytes()).hexdigest() != digests[part.suffix.removeprefix(".")]:
                file = part
                break
        else:
            return True
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, IndexError, Image.DecompressionBombError):
        pass
    said.warning("the sample %s is damaged; it is made again", file)
    return False
