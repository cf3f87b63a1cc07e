"""The one place that opens pictures: regular files of a bounded size, formats that Pillow reads by itself, upright, in
8 bits. No format that starts another program (EPS, WMF) is ever tried, whatever a file is called; torch-free."""

from __future__ import annotations

import errno
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageChops, ImageOps, PngImagePlugin

from runner.files import read_bytes

MOST_BYTES = 2**29
"""Of one picture's file; its pixels are bounded by Pillow (179 million)."""
GROUND = "white"
"""What stands behind transparent pixels where transparency is not a mask."""
EXTRA = "runner[pictures]"
"""What to install for HEIC and JPEG XL."""

TRANSPARENT, DEEP, ANIMATED, MIRRORED = "transparent", "deep", "animated", "mirrored"
"""Facts of a picture: pixels one can see through; more than 8 bits of grey, which are scaled; several frames or pages. Of a
video: shown mirrored."""

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    ArithmeticError,
    MemoryError,
    AttributeError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's decoders and plugins raise on bytes that are no whole picture."""
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28
# Workflows and prompts in megabytes of text make no picture a broken one.
warnings.filterwarnings("ignore", module=r"PIL\.")
# What is odd but readable. Once here: filters are the process's, and pictures are read in threads.


class MissingDecoder(OSError):
    """A picture of a format that needs another package; `strerror` names it."""


def read_picture(source: Path | str | bytes) -> Image.Image:
    """The first frame of a picture, whole, upright, in 8 bits; its file or its content. Raises `OSError`, whose
    `strerror` says what is wrong."""
    return _read(source)[0]


def probe_picture(content: bytes) -> tuple[tuple[int, int], str]:
    """(upright (width, height), its facts, separated by spaces) of a picture's content. Raises `OSError`."""
    picture, facts = _read(content)
    if TRANSPARENT in facts and alpha_of(picture).getextrema()[0] == 255:
        facts.remove(TRANSPARENT)
    return picture.size, " ".join(facts)


def decoding(facts: str, masked: bool = False) -> str:
    """Those facts of a picture or video (runner/dataset/frames.py) that say how it is decoded, for the keys of encodings.
    `masked`: its transparency is a mask, and nothing is put behind it."""
    if not facts:
        return ""
    words = (DEEP, MIRRORED) if masked else (TRANSPARENT, DEEP, MIRRORED)
    return " ".join(word for word in facts.split() if word in words)


def has_alpha(picture: Image.Image) -> bool:
    """Whether a picture can have transparent pixels."""
    return picture.has_transparency_data


def alpha_of(picture: Image.Image) -> Image.Image:
    """How opaque each pixel is: mode L."""
    return picture.convert("RGBA").getchannel("A")


def as_rgb(picture: Image.Image, ground: str | None = GROUND) -> Image.Image:
    """RGB on a ground; None: transparency is taken off, and the colour behind it shows."""
    if ground is None or not has_alpha(picture):
        return picture.convert("RGB")
    whole = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", whole.size, ground), whole).convert("RGB")


def _read(source: Path | str | bytes) -> tuple[Image.Image, list[str]]:
    name = "" if isinstance(source, bytes) else str(source)
    content = source if isinstance(source, bytes) else read_bytes(source, MOST_BYTES)
    with _guarded(name):
        if not content:
            raise OSError(errno.EINVAL, "it is empty")
        picture = Image.open(BytesIO(content), formats=_formats_of(content))
        key = _scaled_key(picture)
        facts = [ANIMATED] if getattr(picture, "is_animated", False) and picture.format != "MPO" else []
        picture.load()
        if key is not None:
            picture.info["transparency"] = key
        if picture.format == "JXL" and not getattr(picture, "jpeg", False):
            return _shallow(picture, facts), facts  # its decoder has turned it already, whatever EXIF says
        ImageOps.exif_transpose(picture, in_place=True)
        return _shallow(picture, facts), facts


@contextmanager
def _guarded(name: str) -> Iterator[None]:
    """Whatever decoding raises becomes an `OSError` with a reason."""
    try:
        yield
    except MissingDecoder:
        raise
    except _ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "its content is no picture of a known format"
        elif isinstance(error, Image.DecompressionBombError):
            reason = f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
        elif isinstance(error, MemoryError):
            reason = "it needs more memory than there is"
        elif not isinstance(error, (OSError, SyntaxError)):
            reason = f"{type(error).__name__}: {reason}"
        raise OSError(errno.EINVAL, " ".join(reason.split())[:200], name) from None


def _formats_of(content: bytes) -> tuple[str, ...]:
    """What to try: Pillow's own formats, or the one of a plugin that the content asks for. Raises `MissingDecoder`."""
    if content[4:8] == b"ftyp" and content[8:12] in _HEIF_BRANDS:
        try:
            import pillow_heif
        except ImportError:
            raise MissingDecoder(errno.EINVAL, f"HEIC pictures need pillow-heif: pip install '{EXTRA}'") from None
        pillow_heif.register_heif_opener()
        return ("HEIF",)
    if content[:2] == b"\xff\x0a" or content[4:12] == b"JXL \r\n\x87\n":
        try:
            import pillow_jxl  # noqa: F401  (registers itself)
        except ImportError:
            raise MissingDecoder(
                errno.EINVAL, f"JPEG XL pictures need pillow-jxl-plugin: pip install '{EXTRA}'"
            ) from None
        if _jxl_pixels(content) > 2 * (Image.MAX_IMAGE_PIXELS or 0):  # the plugin decodes before it tells the size
            raise Image.DecompressionBombError
        return ("JXL",)
    return _FORMATS


def _jxl_pixels(content: bytes) -> int:
    """Pixels by the header of a JPEG XL codestream (ISO/IEC 18181-1, SizeHeader), which may lie in boxes."""
    place = 0
    while content[place + 4 : place + 8] not in (b"jxlc", b"jxlp") and content[:2] != b"\xff\x0a":
        length = int.from_bytes(content[place : place + 4])
        if length < 8 or place + length >= len(content):
            return 0
        place += length
    if content[:2] != b"\xff\x0a":
        place += 12 if content[place + 4 : place + 8] == b"jxlp" else 8
    bits = int.from_bytes(content[place + 2 : place + 14], "little")

    def take(count: int) -> int:
        nonlocal bits
        value = bits & ((1 << count) - 1)
        bits >>= count
        return value

    small = take(1)

    def side() -> int:
        return (take(5) + 1) * 8 if small else take((9, 13, 18, 30)[take(2)]) + 1

    height = side()
    ratio = take(3)
    across = ((1, 1), (6, 5), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
    width = side() if ratio == 0 else height * across[ratio - 1][0] // across[ratio - 1][1]
    return width * height


def _scaled_key(picture: Image.Image) -> int | tuple[int, ...] | None:
    """A PNG's transparent colour in 8 bits, where its samples have 2, 4 or 16: Pillow scales those, not the key."""
    key = picture.info.get("transparency")
    tiles = getattr(picture, "tile", None)
    layout = str(tiles[0].args) if picture.format == "PNG" and tiles else ""
    if isinstance(key, int) and layout in ("L;2", "L;4"):
        return key * (85 if layout == "L;2" else 17)
    if isinstance(key, tuple) and layout == "RGB;16B":
        return tuple(value >> 8 for value in key)
    return None


def _shallow(picture: Image.Image, facts: list[str]) -> Image.Image:
    """In 8 bits, and what is to be said of it."""
    if picture.mode[0] in "IF":
        facts.append(DEEP)
        picture = _grey(picture)
    if has_alpha(picture):
        facts.append(TRANSPARENT)
    return picture


def _grey(picture: Image.Image) -> Image.Image:
    """Grey of 12, 16 or 32 bits or of fractions, in mode L or LA."""
    import numpy as np

    values = np.nan_to_num(np.asarray(picture, dtype=np.float64))
    tags = getattr(picture, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))
    white = _white(picture.mode, float(values.max()), bits[0] if isinstance(bits, tuple) else bits)
    grey = Image.fromarray(np.rint(np.clip(values / white, 0, 1) * 255).astype(np.uint8))
    if tags.get(_PHOTOMETRIC) == 0:
        grey = ImageChops.invert(grey)
    key = picture.info.get("transparency")
    if isinstance(key, int):
        grey = Image.merge("LA", (grey, Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))))
    return grey


def _white(mode: str, most: float, bits: int) -> float:
    """The value that is white. Whole numbers of 32 bits and fractions do not say it: the least usual one that holds all
    values, where a little over 1 is light brighter than white."""
    if mode.startswith("I;"):
        return float(2**bits - 1) if bits < 16 else 65535.0
    usual = [1.0] if mode == "F" and most <= 16 else [255.0, 65535.0, 2.0**32 - 1]
    white = next((value for value in usual if most <= max(value, 16)), None)
    if white is None:
        raise ValueError(f"its values reach {most:g}; white is 1, 255, 65,535 or 4,294,967,295")
    return white
