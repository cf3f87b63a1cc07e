"""Predicted peak memory of the SD families."""

from __future__ import annotations

from runner.families.spec import MemoryAnswer, MemoryQuestion


def predict_memory(question: MemoryQuestion) -> MemoryAnswer:
    return MemoryAnswer({"train": 0})
