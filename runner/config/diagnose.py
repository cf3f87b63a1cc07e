"""Turns pydantic's findings into diagnostics: in words, with the place in the file and what to do."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from runner.config.foreign import FOREIGN_KEYS
from runner.config.foreign_values import foreign_value, list_hint, numbers_hint, pattern_hint, pattern_words, table_hint
from runner.config.schema import all_keys
from runner.config.source import Path, Source
from runner.errors import Diagnostic
from schemas.walk import Key

MOST_FINDINGS = 50
"""Of one kind of look at a file; what more there is, is counted."""


def diagnose(error: ValidationError, source: Source) -> tuple[list[Diagnostic], list[Path]]:
    """One diagnostic for each place (a union reports each of its members), and all offending paths."""
    by_path: dict[Path, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        by_path.setdefault(real_path(detail["loc"], source.document), []).append(detail)
    # A value that fits one kind of a union but not its limits is reported for the items inside it, not for the whole.
    shown = list(by_path.items())[:MOST_FINDINGS]
    found = [_diagnostic(path, details, source) for path, details in shown]
    if len(by_path) > len(shown):
        found.append(Diagnostic(f"and {len(by_path) - len(shown):,} more errors", hint="mend these first"))
    return found, list(by_path)


def real_path(location: tuple[str | int, ...], document: Any) -> Path:
    """A pydantic location without the tags of union members: only what leads through the document."""
    path: Path = ()
    node = document
    for position, part in enumerate(location):
        if isinstance(node, dict) and isinstance(part, str):
            is_last = position == len(location) - 1
            if part in node or (is_last and not _is_tag(part)):
                path, node = (*path, part), node.get(part)
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            path, node = (*path, part), node[part]
    return path


def _is_tag(part: str) -> bool:
    return "[" in part or part in ("int", "float", "str", "bool", "list") or part.startswith("constrained")


def _diagnostic(path: Path, details: list[ErrorDetails], source: Source) -> Diagnostic:
    # Of the members of a union, the one that the value is of and only too large for says most.
    details = sorted(details, key=lambda found: found["type"] not in (*_TOO_MUCH, "value_error"))
    detail = details[0]
    kind = detail["type"]
    if kind == "extra_forbidden":
        return Diagnostic(
            f"unknown key `{path[-1]}`{_in_section(path[:-1])}", source.key_places(path), hint_for_unknown(path)
        )
    if kind == "missing":
        return _missing(path, source)
    key = all_keys().get(dotted(path))
    value = source.value(path)
    if key is None or key.section is not None:  # an item of a list, or a table that is none
        return _wrong_shape(path, details, value, source)
    if kind in _TOO_MUCH or kind == "value_error":
        return Diagnostic(f"`{dotted(path)}`{_too_much(detail)}", source.value_places(path))
    expected = _expected(key, details)
    return Diagnostic(
        f"`{dotted(path)}` must be {expected}, not {_shown(value)}",
        source.value_places(path),
        _hint_for_value(key, value, details) or f"`runner explain {key.dotted}` says more",
    )


_FIRST = {"dataset.sources": "path", "sampling.prompts": "prompt", "selection.publish": "format"}
"""The key of an array of tables that a plain text most likely is."""

_TOO_MUCH = {"string_too_long": "characters", "too_long": "entries"}


def _too_much(detail: ErrorDetails) -> str:
    """What a limit of length, or a check of our own, has to say."""
    if detail["type"] == "value_error":
        return f": {detail['ctx']['error']}"
    given = detail["ctx"].get("actual_length") or len(detail["input"])
    return f" has {given:,} {_TOO_MUCH[detail['type']]}; {detail['ctx']['max_length']:,} are the most"


def _wrong_shape(path: Path, details: list[ErrorDetails], value: Any, source: Source) -> Diagnostic:
    detail = details[0]
    places = source.value_places(path)
    key = all_keys().get(dotted(path))
    if detail["type"] in _TOO_MUCH or detail["type"] == "value_error":
        return Diagnostic(f"`{indexed(path)}`{_too_much(detail)}", places)
    if key is not None:
        if key.is_array_of_tables:
            if detail["type"] == "too_short":
                return Diagnostic(
                    f"[{key.path[0]}] needs at least one [[{key.dotted}]]",
                    places,
                    f'add [[{key.dotted}]] with path = "a folder"',
                )
            return Diagnostic(
                f"`{key.dotted}` must be an array of tables, not {_shown(value)}",
                places,
                list_hint(key.dotted, _FIRST.get(key.dotted, "path"), value) or f"write [[{key.dotted}]]",
            )
        own = frozenset(other.path[-1] for other in all_keys().values() if other.path[:-1] == key.path)
        way_out = table_hint(key.dotted, value, own) or f"write [{key.dotted}]"
        return Diagnostic(f"`{key.dotted}` must be a table, not {_shown(value)}", places, way_out)
    names = [part for part in path if isinstance(part, str)]
    parents = [".".join(names[:end]) for end in range(len(names), 0, -1)]
    parent = next((all_keys()[name] for name in parents if name in all_keys()), None)
    message = f"`{indexed(path)}`: {sentence(detail)}, not {_shown(value)}"
    hint = f"`{parent.dotted}` is {parent.type_text}" if parent else None
    return Diagnostic(message, places, hint)


def sentence(detail: ErrorDetails) -> str:
    """What pydantic says of a value, in our words: "must be at least 1"."""
    text = detail["msg"].replace("Input should be", "must be").replace("greater than or equal to", "at least")
    text = text.replace("less than or equal to", "at most").replace("a valid ", "a ")
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def _missing(path: Path, source: Source) -> Diagnostic:
    section, name = path[:-1], path[-1]
    key = all_keys().get(dotted(path))
    where = f"[{dotted(section)}]" if section else "the file"
    if key is not None and key.section is not None:
        return Diagnostic(
            f"section [{name}] is missing", source.file_place(), f"add [{name}]; see `runner explain {name}`"
        )
    if key is not None and key.array:
        where = f"[[{dotted(section)}]]"
    example = f"; {name} is {key.type_text}" if key else ""
    return Diagnostic(f"{where} needs `{name}`", source.header_places(section), f"add `{name} = …`{example}")


def _expected(key: Key, details: list[ErrorDetails]) -> str:
    kinds = {detail["type"] for detail in details}
    if "string_pattern_mismatch" in kinds:
        return pattern_words(key.dotted) or f"text that matches {details[0]['ctx']['pattern']}"
    text = key.type_text
    if text.startswith('"') and " | " in text:
        return "one of " + text.replace(" | ", ", ")
    return text


def _hint_for_value(key: Key, value: Any, details: list[ErrorDetails]) -> str | None:
    text = key.type_text
    meant = foreign_value(key.dotted, value) or pattern_hint(key.dotted, value)
    if meant is not None:
        return meant
    if isinstance(value, str):
        choices = [choice.strip('"') for choice in text.split(" | ") if choice.startswith('"')]
        near = difflib.get_close_matches(value.lower().replace("-", "_").replace(" ", "_"), choices, 1, 0.5)
        if near:
            return f'did you mean "{near[0]}"?'
        if choices:
            return None
        if "number" in text or "integer" in text:
            number = _as_number(value)
            if number is not None:
                return f"write it without quotes: {key.path[-1]} = {value}"
            pair = numbers_hint(key.path[-1], value, "a list of" in text)
            if pair is not None:
                return pair
        if value.lower() in ("true", "false") and "true or false" in text:
            return f"write it without quotes: {key.path[-1]} = {value.lower()}"
    if isinstance(value, bool) and "true or false" not in text and text.startswith('"'):
        return f"write one of {text.replace(' | ', ', ')}"
    return None


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def hint_for_unknown(path: Path) -> str | None:
    """Where an unknown key belongs: another tool's name, a near name here, or a key of another section."""
    name = str(path[-1])
    section = dotted(path[:-1])
    siblings = {key.path[-1]: key for key in all_keys().values() if ".".join(key.path[:-1]) == section}
    elsewhere = [
        key for key in all_keys().values() if key.path[-1] == name and not key.dotted.startswith("dataset.sources")
    ]
    if elsewhere:
        return "this key stands in " + " or ".join(_section_text(key) for key in elsewhere[:3])
    near = difflib.get_close_matches(name, siblings, 1, 0.75)
    if near:
        return f"did you mean `{near[0]}`?"
    lowered = name.lower().replace("-", "_").lstrip("_")
    meant = difflib.get_close_matches(lowered, FOREIGN_KEYS, 1, 0.85)
    if meant:
        ours = FOREIGN_KEYS[meant[0]]
        if ours.rpartition(".")[2] in siblings and ours in all_keys():
            ours = ours.rpartition(".")[2]
        named = "this" if meant[0] == lowered else f"`{meant[0]}`"
        return f"here {named} is `{ours}`" if " " not in ours else f"here: {ours}"
    near = difflib.get_close_matches(name, siblings, 1, 0.6)
    if near:
        return f"did you mean `{near[0]}`?"
    names = {key.path[-1]: key for key in all_keys().values()}
    far = difflib.get_close_matches(name, names, 1, 0.75)
    if far:
        return f"did you mean `{far[0]}` in {_section_text(names[far[0]])}?"
    return f"keys of {_label(path[:-1])}: {', '.join(siblings)}" if siblings else None


def _section_text(key: Key) -> str:
    if len(key.path) == 1:
        return "the file itself" if key.section is None else f"[{key.path[0]}]"
    parent = ".".join(key.path[:-1])
    return f"[[{parent}]]" if key.array else f"[{parent}]"


def _in_section(section: Path) -> str:
    return f" in {_label(section)}" if section else ""


def _label(section: Path) -> str:
    name = dotted(section)
    if not name:
        return "the file"
    key = all_keys().get(name)
    return f"[[{name}]]" if key is not None and key.is_array_of_tables else f"[{name}]"


def dotted(path: Iterable[str | int]) -> str:
    """The path without list indexes: `sampling.prompts.seed`."""
    return ".".join(str(part) for part in path if isinstance(part, str))


def indexed(path: Path) -> str:
    """The path with its list indexes: `sampling.prompts[0].seed`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return text


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    kind = "the text " if isinstance(value, str) else "the table " if isinstance(value, dict) else ""
    return kind + (text if len(text) <= 60 else text[:57] + "…")
