"""Rewrites run.toml's text: tidy, minimal or full. Comments stay where they are."""

from __future__ import annotations

import re
from typing import Any

import tomlkit
from tomlkit.items import AoT, Table

from runner.config.locate import locate
from runner.config.schema import all_keys, leaf_keys
from schemas import RunConfig
from schemas.base import Section
from schemas.walk import Key


def tidy_text(text: str) -> str:
    """One space around each `=`, no blanks at line ends, an empty line before a table (and its comments), one line end at the end."""
    lines = text.replace("\r\n", "\n").split("\n")
    positions = locate(text)
    for path, span in positions.keys.items():
        value = positions.values.get(path)
        if value is not None and value.line == span.line:
            line = lines[span.line - 1]
            before, after = line[: value.column - 1], line[value.column - 1 :]
            if re.fullmatch(r"\s*[\w.\"'-]+\s*=\s*", before):  # a key at the line's start, not inside an inline table
                lines[span.line - 1] = re.sub(r"^\s*(.*?)\s*=\s*$", r"\1 = ", before) + after
    inside = _inside_strings(text)
    tidied: list[str] = []
    for number, line in enumerate(lines, 1):
        if number in inside:
            tidied.append(line)
            continue
        stripped = line.rstrip()
        if not stripped and (not tidied or not tidied[-1]):
            continue
        if re.match(r"\[\[?[\w.\"'-]+\]", stripped):
            _blank_before_table(tidied)
        tidied.append(stripped)
    return "\n".join(tidied).strip("\n") + "\n"


def _inside_strings(text: str) -> set[int]:
    """Lines that begin inside a multi-line string; they are left alone."""
    found: set[int] = set()
    for match in re.finditer(r'("""|\'\'\')(?:.|\n)*?\1', text):
        first = text.count("\n", 0, match.start()) + 1
        found.update(range(first + 1, first + match.group().count("\n") + 1))
    return found


def _blank_before_table(lines: list[str]) -> None:
    """Puts an empty line before a table, or before the comments that stand right above it."""
    at = len(lines)
    while at > 0 and lines[at - 1].startswith("#") and not lines[at - 1].startswith("#:"):
        at -= 1
    if at > 0 and lines[at - 1]:
        lines.insert(at, "")


def minimal_text(text: str) -> str:
    """Without the keys whose value is the default's; empty sections go too."""
    document = tomlkit.parse(text)
    keys = {key.path: key for key in leaf_keys()}

    def clean(node: Any, path: tuple[str, ...]) -> None:
        for name in list(node):
            value, here = node[name], (*path, name)
            if isinstance(value, AoT) or (isinstance(value, list) and value and isinstance(value[0], dict)):
                for item in value:
                    clean(item, here)
            elif isinstance(value, dict) and here not in keys:
                clean(value, here)
                if not value and here in _sections() and not _meaningful_empty(here):
                    del node[name]
            elif here in keys and _is_default(keys[here], value):
                del node[name]

    clean(document, ())
    return tomlkit.dumps(document)


def _is_default(key: Key, value: Any) -> bool:
    """Whether the key says what it would say unset; in a source, unset means as in [dataset]."""
    return key.path[:2] != ("dataset", "sources") and not key.required and _unwrapped(value) == key.default


def _meaningful_empty(path: tuple[str, ...]) -> bool:
    """Sections whose mere presence says something."""
    return path in (("network",), ("training", "ema"))


def _sections() -> set[tuple[str, ...]]:
    return {key.path for key in all_keys().values() if key.section is not None}


def _unwrapped(value: Any) -> Any:
    return value.unwrap() if hasattr(value, "unwrap") else value


def full_text(text: str, resolved: RunConfig, written: RunConfig) -> str:
    """Every key that has a value, derived ones too; keys that stay unset cannot be written in TOML."""
    document = tomlkit.parse(text)
    skipped = _exclusive(written)

    def fill(node: Any, section: Section, path: tuple[str, ...]) -> None:
        for name in type(section).model_fields:
            value, here = getattr(section, name), (*path, name)
            if isinstance(value, Section):
                if name not in node:
                    node[name] = tomlkit.table()
                fill(node[name], value, here)
            elif isinstance(value, list) and value and isinstance(value[0], Section):
                for item, entry in zip(node.get(name, []), value, strict=False):
                    if here != ("dataset", "sources"):  # a source's unset keys come from [dataset]
                        fill(item, entry, here)
            elif value is not None and name not in node and value not in ([], {}) and here not in skipped:
                node[name] = value

    fill(document, resolved, ())
    _tables_last(document)
    return tomlkit.dumps(document)


def _exclusive(written: RunConfig) -> set[tuple[str, ...]]:
    """Derived keys that must not stand beside the key that they are derived from."""
    skipped: set[tuple[str, ...]] = {("run", "output_dir")}
    pairs = [
        (written.training.max_train_epochs, ("training", "max_train_steps")),
        (written.training.checkpoints.every_n_epochs, ("training", "checkpoints", "every_n_steps")),
        (written.sampling.every_n_epochs, ("sampling", "every_n_steps")),
    ]
    skipped |= {path for given, path in pairs if given is not None}
    held_out = written.dataset.held_out
    if held_out is not None and held_out.path is None:  # the other keys go with a path
        skipped |= {("dataset", "held_out", name) for name in type(held_out).model_fields}
    return skipped


def _tables_last(node: Any) -> None:
    """Moves plain keys before sub-tables: behind one they would belong to it."""
    for name in list(node):
        if isinstance(node[name], Table):
            _tables_last(node[name])
    names = list(node)
    first_table = next((i for i, name in enumerate(names) if isinstance(node[name], (Table, AoT))), len(names))
    if any(not isinstance(node[name], (Table, AoT)) for name in names[first_table:]):
        for name in [n for n in names if isinstance(node[n], (Table, AoT))]:
            node[name] = node.pop(name)
