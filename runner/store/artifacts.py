"""Reads what finished stages recorded; torch-free."""

from __future__ import annotations

from typing import Any

from runner.records import sound_record
from runner.store.store import Store

RECORD = "selection.json"
SELECTION = {
    "chosen": {"step": int, "weights": str},
    "reason": str,
    "candidates": [{"step": int, "weights": str, "verdict": str}],
}


def read_selection(store: Store, fingerprint: str) -> dict[str, Any] | None:
    """The record of a finished selection; None where there is none, or a damaged one."""
    return sound_record(store.artifact("select", fingerprint) / RECORD, SELECTION)
