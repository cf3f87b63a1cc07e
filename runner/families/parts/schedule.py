"""The noise schedule that a checkpoint's folder says: its values are checked before anything is planned with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner.families.parts.files import CHECKPOINT
from runner.model.model import ModelProblem

_MOST_TIMESTEPS = 100_000
SEQUENCES = {"base_image_seq_len": 256, "max_image_seq_len": 4096}
"""Tokens between which a dynamic shift is a straight line, as diffusers names them, and their usual values."""
_CHOICES = {"beta_schedule": ("linear", "scaled_linear"), "prediction_type": ("epsilon", "v_prediction")}


def check_schedule(schedule: Mapping[str, Any], file: Path, discrete: bool) -> None:
    """`discrete`: noise levels are steps of betas, not a flow. Raises `ModelProblem`."""

    def wrong(name: str, wanted: str) -> ModelProblem:
        return ModelProblem(CHECKPOINT, f"{file}: `{name}` must be {wanted}, not {str(schedule[name])[:60]}")

    given = {name: value for name, value in schedule.items() if value is not None}
    count = given.get("num_train_timesteps", 1000)
    if type(count) is not int or not 1 < count <= _MOST_TIMESTEPS:
        raise wrong("num_train_timesteps", f"an integer from 2 to {_MOST_TIMESTEPS:,}")
    if "shift" in given and not _between(given["shift"], 0, 1000):
        raise wrong("shift", "a number above 0 and below 1000")
    for name in ("base_shift", "max_shift"):
        if name in given and not _between(given[name], -10, 10):
            raise wrong(name, "a number between -10 and 10")
    few, many = (given.get(name, usual) for name, usual in SEQUENCES.items())
    if type(few) is not int or type(many) is not int or not 0 < few < many <= 10_000_000:
        name = "max_image_seq_len" if "max_image_seq_len" in given else "base_image_seq_len"
        raise wrong(name, "whole numbers, the larger one max_image_seq_len")
    if not discrete:
        return
    for name in ("beta_start", "beta_end"):
        if name in given and not _between(given[name], 0, 1):
            raise wrong(name, "a number between 0 and 1")
    betas = given.get("trained_betas", [0.5, 0.5])
    if (
        not isinstance(betas, list)
        or not 1 < len(betas) <= _MOST_TIMESTEPS
        or not all(_between(b, 0, 1) for b in betas)
    ):
        raise wrong("trained_betas", "a list of numbers between 0 and 1")
    for name, known in _CHOICES.items():
        if given.get(name, known[0]) not in known:
            raise wrong(name, " or ".join(known))


def _between(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low < value < high
