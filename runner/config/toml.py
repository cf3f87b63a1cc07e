"""TOML from outside: parsed within bounds, and what is wrong with it shown where it stands."""

from __future__ import annotations

import re
from typing import Any

import tomli

from runner.config.foreign_values import backslash_hint
from runner.errors import Diagnostic, InvalidConfig, Place
from runner.files import parsing

MOST_DEPTH = 16
MOST_PARTS = 50
_MANY_PARTS = re.compile(
    rf"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){{{MOST_PARTS}}}""", re.ASCII
)
"""A dotted key of so many parts: parsing takes the square of their number."""
_LONG_NUMBER = re.compile(r"[0-9_]{4000}")


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """The document. Raises `InvalidConfig` with the place in the file `name`."""
    lines = text.replace("\r\n", "\n").split("\n")

    def unreadable(reason: str) -> InvalidConfig:
        place = _at(_LONG_NUMBER.search(text), text, name)
        return InvalidConfig([Diagnostic(f"{name} cannot be read: {reason}", (place,))])

    check_parts(text, name)
    with parsing(unreadable):
        try:
            document = tomli.loads(text)
        except tomli.TOMLDecodeError as error:
            line = min(max(error.lineno, 1), len(lines))
            column = max(1, min(error.colno, len(lines[line - 1]) + 1))
            place = Place(file=name, line=line, column=column, length=1, text=lines[line - 1])
            message = f"not valid TOML: {error.msg[0].lower()}{error.msg[1:]}"
            hint = _syntax_hint(error.msg, lines[line - 1])
            raise InvalidConfig([Diagnostic(message, (place,), hint)]) from None
    if depth(document) > MOST_DEPTH:
        raise InvalidConfig([Diagnostic(f"{name} cannot be read: it is nested too deeply", (Place(file=name),))])
    return document


def check_parts(text: str, name: str) -> None:
    """Raises `InvalidConfig` for a key of so many parts that parsing it would take for ever."""
    found = _MANY_PARTS.search(text)
    if found is not None:
        raise InvalidConfig([Diagnostic(f"a key has more than {MOST_PARTS} parts", (_at(found, text, name),))])


def _at(found: re.Match[str] | None, text: str, name: str) -> Place:
    if found is None:
        return Place(file=name)
    line, start = text.count("\n", 0, found.start()), text.rfind("\n", 0, found.start())
    return Place(
        file=name, line=line + 1, column=found.start() - start, length=1, text=text.split("\n")[line].rstrip("\r")
    )


def depth(document: Any) -> int:
    """How deep tables and lists are nested, without recursion."""
    deepest, waiting = 0, [(document, 1)]
    while waiting:
        node, level = waiting.pop()
        deepest = max(deepest, level)
        inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        waiting += [(value, level + 1) for value in inner if isinstance(value, (dict, list))]
    return deepest


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
