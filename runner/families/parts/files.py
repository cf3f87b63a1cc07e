"""The files of a component: shards, headers, configurations, and where the shipped ones are; torch-free."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from runner.errors import Invalid
from runner.families.locate import KeyPath, weights_in
from runner.files import MOST_JSON_BYTES, parsing, read_bytes
from runner.model.model import ModelProblem
from runner.weights.headers import Header, read_header

CONFIGS = Path(__file__).parent.parent / "configs"
BUILTIN = Path(__file__).parent.parent / "sd" / "builtin"
CHECKPOINT: KeyPath = ("model", "checkpoint")


def read_json(file: Path) -> dict[str, Any]:
    """A component's configuration. Raises `ModelProblem`."""
    try:
        raw = read_bytes(file, MOST_JSON_BYTES)
    except OSError as error:
        raise ModelProblem(CHECKPOINT, f"{file} cannot be read: {error.strerror}") from None
    with parsing(lambda reason: ModelProblem(CHECKPOINT, f"{file} cannot be read: {reason}")):
        content = json.loads(raw.decode("utf-8"))
    if not isinstance(content, dict):
        raise ModelProblem(CHECKPOINT, f"{file} holds no table")
    return content


_SHARD = re.compile(r"(.*-)(\d{5})(-of-)(\d{5})(\.safetensors|\.bin)")


def shards_of(file: Path, key: KeyPath) -> tuple[Path, ...]:
    """The file, or all shards of which it is one. Raises `ModelProblem` where one is missing."""
    match = _SHARD.fullmatch(file.name)
    if match is None:
        return (file,)
    head, _, middle, total, tail = match.groups()
    files = tuple(file.with_name(f"{head}{number:05d}{middle}{total}{tail}") for number in range(1, int(total) + 1))
    for shard in files:
        if not shard.is_file():
            raise ModelProblem(key, f"the shard {shard.name} of {file.name} is missing", f"put it into {file.parent}")
    return files


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The weights of a component's folder: one file, or the shards of one model; empty where there are none."""
    single = weights_in(folder)
    if single is not None:
        return (single,)
    first = sorted(folder.glob("*-00001-of-*.safetensors"), key=lambda file: (len(file.name), file.name))
    return shards_of(first[0], CHECKPOINT) if first else ()


def header_of(file: Path, key: KeyPath) -> Header:
    """The file's header, its problems named at a key of run.toml."""
    try:
        return read_header(file)
    except Invalid as error:
        raise ModelProblem(key, str(error), error.diagnostics[0].hint) from None
