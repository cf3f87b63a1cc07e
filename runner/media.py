"""Which files are pictures or videos, by the endings of their names."""

from __future__ import annotations

IMAGE_EXTENSIONS = frozenset(
    {
        ".png",
        ".apng",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".webp",
        ".bmp",
        ".dib",
        ".gif",
        ".tif",
        ".tiff",
        ".avif",
        ".heic",
        ".heif",
        ".hif",
        ".jxl",
    }
)
"""What runner/pictures.py reads."""
VIDEO_EXTENSIONS = frozenset({".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".flv", ".wmv", ".mpg", ".mpeg", ".ts"})
ENDINGS = {"image": IMAGE_EXTENSIONS, "video": VIDEO_EXTENSIONS}


def is_media(name: str, kind: str) -> bool:
    """Whether a file's name is that of a picture ("image"), or of a video."""
    return name[name.rfind(".") :].lower() in ENDINGS[kind] and not name.startswith(".")


def endings(kind: str) -> str:
    """The endings of pictures or videos, for messages."""
    return " ".join(sorted(extension.lstrip(".") for extension in ENDINGS[kind]))
