"""What a weights file holds, from its header alone: key → shape and dtype. Torch-free, and safe on untrusted files."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from runner.errors import Invalid
from runner.formats.pickles import read_pickle_header

MAX_HEADER_BYTES = 100_000_000
DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
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
        size = file.stat().st_size
        with open(file, "rb") as stream:
            start = stream.read(8)
            if len(start) < 8:
                raise Invalid(f"{file} is no safetensors file: it has {size} bytes")
            length = struct.unpack("<Q", start)[0]
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise Invalid(
                    f"{file} is no whole safetensors file: its header would have {length:,} bytes, the file has {size:,}",
                    hint="it may be cut off, or be of another format",
                )
            content = json.loads(stream.read(length))
    except OSError as error:
        raise Invalid(f"{file} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise Invalid(f"{file} is no safetensors file: its header is not JSON") from None
    return _parsed(file, content, size, 8 + length)


def _parsed(file: Path, content: object, size: int, data: int) -> Header:
    if not isinstance(content, dict):
        raise Invalid(f"{file} is no safetensors file: its header is no table")
    metadata = content.pop("__metadata__", {})
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    begins: dict[str, int] = {}
    end = 0
    for key, entry in content.items():
        try:
            shape = tuple(int(side) for side in entry["shape"])
            begin, stop = (int(offset) for offset in entry["data_offsets"])
            dtype = str(entry["dtype"])
        except (TypeError, KeyError, ValueError):
            raise Invalid(f"{file}: the header's entry for {key!r} is malformed") from None
        needed = prod(shape) * DTYPE_BYTES.get(dtype, 0) or stop - begin
        if min(shape, default=0) < 0 or not 0 <= begin <= stop or stop - begin != needed:
            raise Invalid(f"{file}: the header's entry for {key!r} is malformed")
        tensors[key] = (dtype, shape)
        begins[key] = data + begin
        end = max(end, stop)
    if end > size - data:
        raise Invalid(
            f"{file} is cut off: its tensors need {end:,} bytes, it has {size - data:,}",
            hint="copy or download it again",
        )
    if not isinstance(metadata, dict):
        metadata = {}
    return Header(tensors, {str(name): str(value) for name, value in metadata.items()}, begins)
