"""Reads run.toml: bytes → document → RunConfig, or every finding at once."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from runner.config.crosscheck import cross_check
from runner.config.diagnose import MOST_FINDINGS, diagnose, dotted, indexed
from runner.config.locate import Path
from runner.config.overrides import apply_overrides
from runner.config.schema import all_keys, run_config
from runner.config.source import Source
from runner.config.toml import parse_toml
from runner.errors import Diagnostic, InvalidConfig, Place
from runner.files import MOST_TEXT_BYTES, near_name, read_bytes
from schemas import SCHEMA_VERSION, RunConfig


@dataclass
class Loaded:
    """A configuration as far as it could be read. `config` is None where too much is wrong to go on."""

    source: Source
    config: RunConfig | None
    diagnostics: list[Diagnostic] = field(default_factory=list)

    @property
    def errors(self) -> list[Diagnostic]:
        return [finding for finding in self.diagnostics if finding.severity == "error"]

    def require(self) -> RunConfig:
        """The configuration, or `InvalidConfig` with all errors."""
        if self.errors or self.config is None:
            raise InvalidConfig(self.diagnostics)
        return self.config


def load(file: FilePath, settings: Sequence[str] = ()) -> Loaded:
    """Parses and validates a run.toml with `settings` (from --set) over it.

    Keys with errors are taken out and the rest is checked all the same, so that one call finds as much as it can.
    Raises `InvalidConfig` where the file cannot be read or is no TOML, `UsageError` for a malformed setting.
    """
    source = read(file)
    source.overrides = apply_overrides(source.document, settings)
    return check(source)


def changed(source: Source, values: Mapping[str, Any]) -> Loaded:
    """The same file as if it said these values of dotted keys, checked."""
    document = deepcopy(source.document)
    for dotted_key, value in values.items():
        *tables, name = dotted_key.split(".")
        node = document
        for table in tables:
            node = node.setdefault(table, {})
        node[name] = value
    return check(replace(source, document=document))


def check(source: Source) -> Loaded:
    """Validates a document that was read."""
    diagnostics = _unfit(source)
    if diagnostics:
        return Loaded(source, None, diagnostics)
    version = source.document.get("schema_version")
    if type(version) is int and version != SCHEMA_VERSION:
        hint = "update runner" if version > SCHEMA_VERSION else f"the first version is {SCHEMA_VERSION}"
        message = f"this file has schema_version {version}; this runner reads {SCHEMA_VERSION}"
        return Loaded(source, None, [Diagnostic(message, source.value_places(("schema_version",)), hint)])
    document = source.document
    model = document.get("model")
    schema = run_config(model.get("family") if isinstance(model, dict) else None)
    config: RunConfig | None = None
    for _ in range(4):  # taking out a bad key may leave another error in view
        try:
            config = schema.model_validate_json(json.dumps(document), strict=True)
            break
        except ValidationError as error:
            found, paths = diagnose(error, source)
            diagnostics += found
            document = _without(document, paths)
            if not all(_can_do_without(document, path) for path in paths):
                break
    if config is not None:
        diagnostics += cross_check(config, source)
    return Loaded(source, config, diagnostics)


def read(file: FilePath) -> Source:
    """The text and its document, syntax checked."""
    name = str(file.absolute())
    if name.encode("utf-8", "replace").decode("utf-8") != name:
        raise InvalidConfig([Diagnostic(f"the name {name} is not UTF-8", hint="rename the file or folder")])
    try:
        raw = read_bytes(file, MOST_TEXT_BYTES)
    except FileNotFoundError:
        raise InvalidConfig(
            [
                Diagnostic(
                    f"there is no file {file}", hint=near_name(file) or "`runner recipes` lists files to start from"
                )
            ]
        ) from None
    except IsADirectoryError:
        raise InvalidConfig(
            [Diagnostic(f"{file} is a folder", hint=f"name the file in it: {file / 'run.toml'}")]
        ) from None
    except OSError as error:
        raise InvalidConfig([Diagnostic(f"{file} cannot be read: {error.strerror}")]) from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        message = f"{file.name} is not UTF-8: byte {error.start} (line {line}) cannot be read"
        raise InvalidConfig([Diagnostic(message, (Place(file=file.name),), "save the file as UTF-8")]) from None
    return Source(file=file, text=text, document=parse_toml(text, file.name))


def _unfit(source: Source) -> list[Diagnostic]:
    """Values that TOML has, and no key of run.toml takes: dates and times (JSON cannot hold them), NaN, integers of more
    than 64 bits."""
    findings: list[Diagnostic] = []

    def look(node: Any, path: Path) -> None:
        if isinstance(node, dict):
            for name, value in node.items():
                look(value, (*path, name))
        elif isinstance(node, list):
            for index, value in enumerate(node):
                look(value, (*path, index))
        elif len(findings) < MOST_FINDINGS:
            problem = _no_value(node)
            if problem is not None:
                words, hint = problem
                findings.append(Diagnostic(f"`{indexed(path)}` {words}", source.value_places(path), hint))

    look(source.document, ())
    return findings


def _no_value(value: Any) -> tuple[str, str | None] | None:
    """What is wrong with a value for any key, and a hint."""
    if isinstance(value, (datetime.date, datetime.time)):
        return "is a date; no key takes one", "put it in quotes"
    if isinstance(value, float) and not math.isfinite(value):
        return f"is {value}; numbers must be finite", None
    if isinstance(value, int) and value.bit_length() > 63:
        return "is too large: an integer of TOML has 64 bits", None
    return None


def _can_do_without(document: dict[str, Any], path: Path) -> bool:
    """Whether checking can go on without the value at a path; a stand-in is put where any will do."""
    if path in (("run", "name"), ("schema_version",)):
        node = document.setdefault("run", {}) if path[0] == "run" else document
        node[path[-1]] = "run" if path[0] == "run" else SCHEMA_VERSION
        return True
    key = all_keys().get(dotted(path))
    return key is None or not key.required or isinstance(path[-1], int)


def _without(document: dict[str, Any], paths: Sequence[Path]) -> dict[str, Any]:
    """A copy of the document with the values at the paths taken out, later list items first."""
    pruned = deepcopy(document)
    for path in sorted(
        paths, key=lambda path: [f"{part:09}" if isinstance(part, int) else part for part in path], reverse=True
    ):
        node: Any = pruned
        for part in path[:-1]:
            try:
                node = node[part]
            except (KeyError, IndexError, TypeError):
                node = None
                break
        last: Any = path[-1] if path else None
        if (isinstance(node, dict) and last in node) or (
            isinstance(node, list) and isinstance(last, int) and last < len(node)
        ):
            del node[last]
    return pruned
