"""`--set section.key=value`: the value is TOML, or plain text where it is not; checked like the file itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tomli

from runner.config.locate import Path
from runner.errors import UsageError


def apply_overrides(document: dict[str, Any], settings: Sequence[str]) -> dict[Path, str]:
    """Sets each `a.b.c=value` in the document; list items are named by number (`dataset.sources.0.path=…`)."""
    paths: dict[Path, str] = {}
    for typed in settings:
        name, equals, text = typed.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"--set {typed}: write it as section.key=value")
        path: Path = tuple(int(part) if part.isdigit() else part for part in name.strip().split("."))
        _set(document, path, _parsed(text.strip()), typed)
        paths.pop(path, None)  # what is set again counts where it stands last
        paths[path] = typed
    return paths


def _parsed(text: str) -> Any:
    try:
        return tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        return text


def _set(document: dict[str, Any], path: Path, value: Any, typed: str) -> None:
    node: Any = document
    for part in path[:-1]:
        if isinstance(node, dict) and isinstance(part, str):
            node = node.setdefault(part, {})
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        else:
            raise UsageError(f"--set {typed}: there is no `{part}` in run.toml to set a key of")
    last = path[-1]
    if (isinstance(node, dict) and isinstance(last, str)) or (
        isinstance(node, list) and isinstance(last, int) and last < len(node)
    ):
        node[last] = value  # type: ignore[index]  # the two kinds of `last` go with the two kinds of node
    else:
        raise UsageError(f"--set {typed}: there is no `{last}` in run.toml to set")
