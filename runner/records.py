"""The store's own JSON files: each begins with the sha256 of the rest, so that a damaged one is known for what it is.

A damaged record is said once (the logger "runner") and counts as missing, where it can be made again.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.atomic import remove, write_bytes

_HEAD = re.compile(rb'\A\{\n  "sha256": "([0-9a-f]{64})",\n')
NUMBER = (int, float)
Shape = Mapping[Any, Any]

said = logging.getLogger("runner")
"""What was damaged and is made again; the command line shows it as notes."""


@dataclass(frozen=True)
class Maybe:
    """The shape of what may be missing or null."""

    shape: Any


class DamagedRecord(Exception):
    """A record that cannot be used. Its text is the reason."""

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(reason)
        self.file = file


def write_record(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a record atomically, its digest before everything else. A folder in its place goes: reading has said it."""
    body = (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
    digest = hashlib.sha256(body).hexdigest()
    if file.is_dir():
        remove(file)
    write_bytes(file, b'{\n  "sha256": "' + digest.encode() + b'",\n' + body.removeprefix(b"{\n"))


def read_record(file: Path, shape: Shape) -> dict[str, Any] | None:
    """A record; None where there is none. Raises `DamagedRecord`.

    `shape` has the keys that must be there, each with its type, several types, the shape of a table, [shape of each
    entry of a list], {str: shape of each value} or `Maybe` of one.
    Without a digest a record is held against its shape alone: that is how an older runner wrote them.
    """
    try:
        if file.exists() and not file.is_file():
            raise DamagedRecord(file, "it is no file")
        raw = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DamagedRecord(file, f"it cannot be read: {error.strerror}") from None
    head = _HEAD.match(raw)
    if head is not None and hashlib.sha256(b"{\n" + raw[head.end() :]).hexdigest().encode() != head[1]:
        raise DamagedRecord(file, "it is not what was written")
    content = parsed(file, raw, shape)
    content.pop("sha256", None)
    return content


def sound_record(file: Path, shape: Shape, way_out: str = "it is made again") -> dict[str, Any] | None:
    """A record, or None: a damaged one is said and counts as missing."""
    try:
        return read_record(file, shape)
    except DamagedRecord as error:
        said.warning("%s is damaged (%s); %s", file, error, way_out)
        return None


def read_packed(file: Path) -> dict[str, Any] | None:
    """A table in gzipped JSON, which has a sum of its own; None where it is gone or damaged."""
    try:
        content = json.loads(gzip.decompress(file.read_bytes()))
    except (OSError, ValueError, EOFError, RecursionError, zlib.error):
        return None
    return content if isinstance(content, dict) else None


def parsed(file: Path, raw: bytes, shape: Shape) -> dict[str, Any]:
    """A JSON object of a shape. Raises `DamagedRecord`."""
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        raise DamagedRecord(file, "it is empty" if not raw else "it is no JSON") from None
    if not isinstance(content, dict):
        raise DamagedRecord(file, "it is no JSON object")
    problem = _misfit(content, shape, "")
    if problem is not None:
        raise DamagedRecord(file, problem)
    return content


def _misfit(value: Any, shape: Any, path: str) -> str | None:
    """Why a value has not its shape."""
    if isinstance(shape, Maybe):
        return None if value is None else _misfit(value, shape.shape, path)
    if isinstance(shape, Mapping):
        if not isinstance(value, dict):
            return f"{path} is no table"
        if str in shape:
            return next(
                (why for name, entry in value.items() if (why := _misfit(entry, shape[str], f"{path}.{name}"))), None
            )
        for name, inner in shape.items():
            here = f"{path}.{name}" if path else name
            if name not in value and not isinstance(inner, Maybe):
                return f"{here} is missing"
            problem = _misfit(value.get(name), inner, here)
            if problem is not None:
                return problem
        return None
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{path} is no list"
        return next((problem for entry in value if (problem := _misfit(entry, shape[0], f"{path}[]"))), None)
    kinds = shape if isinstance(shape, tuple) else (shape,)
    if isinstance(value, bool):  # which is an int to Python
        return None if bool in kinds else f"{path} is {value}"
    return None if isinstance(value, kinds) else f"{path} has another type"
