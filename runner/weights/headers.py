"""What a weights file holds, from its header alone: key → shape and dtype. Torch-free, and safe on untrusted files."""

from __future__ import annotations

import itertools
import json
import os
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from runner.errors import Invalid
from runner.files import open_regular, parsing
from runner.weights.pickles import MOST_SIDES, read_pickle_header

MAX_HEADER_BYTES = 25_000_000
"""A full-size model's header has 200 kB; the metadata of a LoRA file can have some MB of tags."""
MOST_TENSORS = 100_000
DTYPE_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Header:
    """Key → (dtype name, shape), the file's string metadata, and where each tensor's bytes begin (safetensors only)."""

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    metadata: dict[str, str] = field(default_factory=dict)
    begins: dict[str, int] = field(default_factory=dict)


def read_header(file: Path) -> Header:
    """The header of a .safetensors file or of a PyTorch zip archive (.ckpt, .pt, .bin). Raises `Invalid`."""
    if file.suffix in PICKLE_SUFFIXES:
        return Header(read_pickle_header(file))
    return read_safetensors_header(file)


def read_safetensors_header(file: Path) -> Header:
    """Reads the JSON header and checks that the file is as long as the header says. Raises `Invalid`."""
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            if len(start) < 8:
                raise Invalid(f"{file} is no safetensors file: it has {size} bytes")
            length = struct.unpack("<Q", start)[0]
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise Invalid(
                    f"{file} is no whole safetensors file: its header would have {length:,} bytes, the file has {size:,}",
                    hint="it may be cut off, or be of another format",
                )
            raw = stream.read(length)
    except OSError as error:
        raise Invalid(f"{file} cannot be read: {error.strerror}") from None
    with parsing(lambda reason: Invalid(f"{file} is no safetensors file: its header is not JSON ({reason})")):
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
        if b"\\u" in raw:
            json.dumps(content, ensure_ascii=False).encode("utf-8")  # half a character could never be written again
    return _parsed(file, content, size - 8 - length, 8 + length)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def _parsed(file: Path, content: object, size: int, data: int) -> Header:
    """`size` is the number of bytes behind the header, which begin at `data`."""
    if not isinstance(content, dict):
        raise Invalid(f"{file} is no safetensors file: its header is no table")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Invalid(f"{file}: the header's __metadata__ is no table of texts")
    if len(content) > MOST_TENSORS:
        raise Invalid(f"{file}: the header names {len(content):,} tensors; at most {MOST_TENSORS:,} are read")
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    spans: list[tuple[int, int, str]] = []
    for key, entry in content.items():
        dtype, shape, begin, stop = _entry(file, key, entry)
        tensors[key] = (dtype, shape)
        spans.append((begin, stop, key))
    end = max((stop for _, stop, _ in spans), default=0)
    if end > size:
        raise Invalid(
            f"{file} is cut off: its tensors need {end:,} bytes, it has {size:,}", hint="copy or download it again"
        )
    spans.sort()
    for (_, stop, before), (begin, _, key) in itertools.pairwise(spans):
        if begin < stop:
            raise Invalid(f"{file}: the tensors {shown(before)} and {shown(key)} lie in the same bytes")
    return Header(tensors, metadata, {key: data + begin for begin, _, key in spans})


def _entry(file: Path, key: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, first byte, byte behind the last) of a tensor. Raises `Invalid`."""
    malformed = Invalid(f"{file}: the header's entry for {shown(key)} is malformed")
    if not isinstance(entry, dict):
        raise malformed
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not _numbers(shape, MOST_SIDES) or not _numbers(offsets, 2) or len(offsets) != 2:
        raise malformed
    begin, stop = offsets
    if begin > stop or stop - begin != (prod(shape) * DTYPE_BYTES[dtype] if dtype in DTYPE_BYTES else stop - begin):
        raise malformed
    return dtype, tuple(shape), begin, stop


def _numbers(value: Any, most: int) -> TypeGuard[list[int]]:
    """Whether a value is a list of at most so many whole numbers, none larger than any file is."""
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(type(item) is int and 0 <= item < 2**53 for item in value)
    )


def shown(key: str) -> str:
    """A tensor's name for a message."""
    return repr(key if len(key) <= 120 else key[:119] + "…")
