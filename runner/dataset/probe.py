"""Reads a picture once: its digest, its upright size, or why it cannot be decoded. Captions: their text."""

from __future__ import annotations

import hashlib
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path

from PIL import Image

from runner.store.index import FileContent

IMAGE_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl"})
VIDEO_EXTENSIONS = frozenset({".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".flv", ".wmv", ".mpg", ".mpeg", ".ts"})
MAX_CAPTION_BYTES = 1_000_000
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, KeyError, IndexError, OverflowError, MemoryError,
    AttributeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's decoders raise on bytes that are no whole picture."""
_ORIENTATION = 0x0112
_TURNED = range(5, 9)


def probe_image(path: Path) -> FileContent:
    """Decodes the whole picture, so that a truncated one is found before training; the index remembers the result."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return FileContent("", problem=f"cannot be read: {error.strerror}")
    digest = hashlib.sha256(content).hexdigest()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(BytesIO(content)) as picture:
                turned = picture.getexif().get(_ORIENTATION) in _TURNED
                picture.load()
                width, height = picture.size
    except DECODE_ERRORS as error:
        reason = "it is empty" if not content else f"{type(error).__name__}: {error}".replace(repr(content), "")
        if isinstance(error, Image.UnidentifiedImageError):
            reason = reason if not content else "its content is no picture of a known format"
        elif isinstance(error, (OSError, SyntaxError)):
            reason = reason if not content else str(error)
        return FileContent(digest, problem=f"cannot be decoded: {reason}")
    if turned:
        width, height = height, width
    return FileContent(digest, width, height)


def probe_video(path: Path) -> FileContent:
    """Decodes the whole video, one frame at a time, and counts its frames (`text`): what containers say of their length
    is often wrong. A video that breaks off is not used."""
    try:
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        return FileContent("", problem=f"cannot be read: {error.strerror}")
    import av

    count, size = 0, (0, 0)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                return FileContent(digest, problem="has no video stream")
            stream_of = container.streams.video[0]
            stream_of.thread_type = "AUTO"
            for frame in container.decode(stream_of):
                if count == 0:
                    turned = abs(frame.rotation) % 180 == 90
                    size = (frame.height, frame.width) if turned else (frame.width, frame.height)
                count += 1
    except (av.FFmpegError, ValueError, MemoryError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return FileContent(digest, problem=f"cannot be decoded after frame {count}: {reason}")
    if count == 0:
        return FileContent(digest, problem="has no frames")
    return FileContent(digest, *size, str(count))


def probe_caption(path: Path) -> FileContent:
    """The caption file's text, which is its own identity: UTF-8, a byte order mark is tolerated."""
    try:
        size = path.stat().st_size
        if size > MAX_CAPTION_BYTES:
            return FileContent("", problem=f"its caption file {path.name} has {size:,} bytes")
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        return FileContent("", problem=f"its caption file {path.name} cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        return FileContent("", problem=f"its caption file {path.name} is not UTF-8 (byte {error.start})")
    return FileContent("", text=text.replace("\x00", ""))
