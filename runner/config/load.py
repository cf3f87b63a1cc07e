"""Reads run.toml: bytes → document → RunConfig, or every finding at once."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any

import tomli
from pydantic import ValidationError

from runner.config.crosscheck import cross_check
from runner.config.diagnose import diagnose, dotted, indexed
from runner.config.foreign_values import backslash_hint
from runner.config.locate import Path
from runner.config.overrides import apply_overrides
from runner.config.source import Source
from runner.errors import Diagnostic, InvalidConfig, Place
from runner.files import near_name
from schemas import SCHEMA_VERSION, RunConfig
from schemas.walk import all_keys


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
    diagnostics = list(_dates(source))
    if diagnostics:
        return Loaded(source, None, diagnostics)
    version = source.document.get("schema_version")
    if type(version) is int and version != SCHEMA_VERSION:
        hint = "update runner" if version > SCHEMA_VERSION else f"the first version is {SCHEMA_VERSION}"
        message = f"this file has schema_version {version}; this runner reads {SCHEMA_VERSION}"
        return Loaded(source, None, [Diagnostic(message, source.value_places(("schema_version",)), hint)])
    document = source.document
    config: RunConfig | None = None
    for _ in range(4):  # taking out a bad key may leave another error in view
        try:
            config = RunConfig.model_validate_json(json.dumps(document), strict=True)
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
    try:
        raw = file.read_bytes()
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
        raise InvalidConfig([Diagnostic(message, (Place(file.name),), "save the file as UTF-8")]) from None
    try:
        return Source(file, text, tomli.loads(text))
    except tomli.TOMLDecodeError as error:
        lines = text.replace("\r\n", "\n").split("\n")
        line = min(max(error.lineno, 1), len(lines))
        column = max(1, min(error.colno, len(lines[line - 1]) + 1))
        place = Place(file.name, line, column, 1, lines[line - 1])
        message = f"not valid TOML: {error.msg[0].lower()}{error.msg[1:]}"
        raise InvalidConfig([Diagnostic(message, (place,), _syntax_hint(error.msg, lines[line - 1]))]) from None
    except RecursionError:
        raise InvalidConfig([Diagnostic(f"{file.name} is nested too deeply", (Place(file.name),))]) from None


def _syntax_hint(message: str, line: str) -> str | None:
    value = line.partition("=")[2].strip()
    if "\\" in value and ("\\" in message or "hex value" in message or "Illegal character" in message):
        return backslash_hint(line)
    if "Invalid value" in message and value[:1].isalpha():
        word = value.split("#")[0].strip()
        if word.lower() in ("true", "false"):
            return f"write {word.lower()} in small letters"
        return f'text stands in quotes: "{word}"'
    if "overwrite" in message or "Cannot declare" in message or "twice" in message:
        return "a key or table may stand only once"
    return None


def _dates(source: Source) -> list[Diagnostic]:
    """TOML dates and times have no place in run.toml, and JSON cannot hold them."""
    findings = []

    def look(node: Any, path: Path) -> None:
        if isinstance(node, dict):
            for name, value in node.items():
                look(value, (*path, name))
        elif isinstance(node, list):
            for index, value in enumerate(node):
                look(value, (*path, index))
        elif isinstance(node, (datetime.date, datetime.time)):
            findings.append(
                Diagnostic(
                    f"`{indexed(path)}` is a date; no key takes one", source.value_places(path), "put it in quotes"
                )
            )
        elif isinstance(node, float) and (node != node or node in (float("inf"), float("-inf"))):
            findings.append(
                Diagnostic(f"`{indexed(path)}` is {node}; numbers must be finite", source.value_places(path))
            )

    look(source.document, ())
    return findings


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
    for path in sorted(paths, key=lambda path: [str(part) for part in path], reverse=True):
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
