"""Reads what finished stages recorded; torch-free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runner.store.store import Store


def read_selection(store: Store, fingerprint: str) -> dict[str, Any] | None:
    """The record of a finished selection."""
    file: Path = store.artifact("select", fingerprint) / "selection.json"
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return content
    except (OSError, ValueError):
        return None
