"""Reads what finished stages recorded; torch-free."""

from __future__ import annotations

from typing import Any

from runner.records import NUMBER, Maybe, said, sound_record
from runner.store.store import Store

RECORD = "selection.json"
SELECTION = {
    "chosen": {"step": int, "weights": str},
    "reason": str,
    "decided_by": str,
    "candidates": [{"step": int, "weights": str, "verdict": str, "reason": str}],
    "metrics": list,
    "levels": [NUMBER],
    "items": {"held_out": int, "training": int},
    "measured_on": str,
    "base": Maybe(dict),
}


def read_selection(store: Store, fingerprint: str) -> dict[str, Any] | None:
    """The record of a finished selection; None where there is none, or a damaged one."""
    file = store.artifact("select", fingerprint) / RECORD
    record = sound_record(file, SELECTION)
    if record is None:
        return None
    candidates = [(row["step"], row["weights"]) for row in record["candidates"]]
    if (record["chosen"]["step"], record["chosen"]["weights"]) not in candidates:
        said.warning("%s is damaged (it chooses what was no candidate); it is made again", file)
        return None
    return record
