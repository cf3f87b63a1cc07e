"""`--set section.key=value`: the value is TOML, or plain text where it is not; checked like the file itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runner.config.locate import Path
from runner.config.toml import MOST_DEPTH, parse_toml
from runner.errors import InvalidConfig, UsageError


def apply_overrides(document: dict[str, Any], settings: Sequence[str]) -> dict[Path, str]:
    """Sets each `a.b.c=value` in the document; list items are named by number (`dataset.sources.0.path=…`)."""
    paths: dict[Path, str] = {}
    for typed in settings:
        name, equals, text = typed.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"--set {_short(typed)}: write it as section.key=value")
        if typed.encode("utf-8", "replace").decode("utf-8") != typed:
            raise UsageError(f"--set {_short(typed)}: it is not UTF-8")
        path: Path = tuple(int(part) if _is_number(part) else part for part in name.strip().split("."))
        if len(path) > MOST_DEPTH:
            raise UsageError(f"--set {_short(typed)}: a key has at most {MOST_DEPTH} parts")
        _set(document, path, _parsed(text.strip(), typed), typed)
        paths.pop(path, None)  # what is set again counts where it stands last
        paths[path] = typed
    return paths


def _short(typed: str) -> str:
    """What was typed, for a message."""
    return typed if len(typed) <= 100 else typed[:99] + "…"


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) < 9


def _parsed(text: str, typed: str) -> Any:
    try:
        return parse_toml(f"value = {text}", "--set")["value"]
    except InvalidConfig as error:
        if error.diagnostics[0].message.startswith("not valid TOML"):
            return text
        raise UsageError(f"--set {_short(typed)}: {error}") from None


def _set(document: dict[str, Any], path: Path, value: Any, typed: str) -> None:
    node: Any = document
    for part in path[:-1]:
        if isinstance(node, dict) and isinstance(part, str):
            node = node.setdefault(part, {})
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        else:
            raise UsageError(f"--set {_short(typed)}: there is no `{part}` in run.toml to set a key of")
    last = path[-1]
    if (isinstance(node, dict) and isinstance(last, str)) or (
        isinstance(node, list) and isinstance(last, int) and last < len(node)
    ):
        node[last] = value  # type: ignore[index]  # the two kinds of `last` go with the two kinds of node
    else:
        raise UsageError(f"--set {_short(typed)}: there is no `{last}` in run.toml to set")
