"""Which checkpoint is the best: vetoes, then the lowest stable loss, then (of enough measured items) the earliest within
its error. Torch-free.

Losses are compared item by item under the same noise: the error of a difference is that of its paired values, far
smaller than that of either loss.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from runner.inputs.select import LEAST_FOR_ERROR, SelectInputs

SELECTION_VERSION = 1
Candidate = tuple[int, str]


def judge(
    inputs: SelectInputs,
    candidates: Sequence[Candidate],
    scores: Mapping[Candidate, dict[str, Any]],
    similarity: Mapping[Candidate, float],
) -> dict[str, Any]:
    """The selection record: a table per candidate and who decided what. `scores` has the base at (0, "raw")."""
    rows = [
        _row(which, scores.get(which), scores.get((0, "raw")), similarity.get(which), inputs) for which in candidates
    ]
    open_rows = [row for row in rows if row["verdict"] != "vetoed"]
    chosen, reason, decided_by = _choose(inputs, rows, open_rows)
    for row in rows:
        if row is chosen:
            row["verdict"], row["reason"] = "chosen", reason
    base = scores.get((0, "raw"))
    measured = "held_out" if inputs.held_out else "compared"
    return {
        "version": SELECTION_VERSION,
        "strategy": "manual" if decided_by == "user" else inputs.strategy,
        "decided_by": decided_by,
        "chosen": {"step": chosen["step"], "weights": chosen["weights"]} if chosen else None,
        "reason": reason,
        "metrics": list(inputs.metrics),
        "measured_on": "held-out items" if inputs.held_out else "training items (nothing is held out)",
        "items": {"held_out": len(inputs.held_out), "training": len(inputs.compared)},
        "seed": inputs.seed,
        "levels": base["levels"] if base else [],
        "base": {"stable_loss": _mean(base[measured]), "per_level": _per_level(base[measured])} if base else None,
        "candidates": rows,
    }


def _row(
    which: Candidate,
    score: dict[str, Any] | None,
    base: dict[str, Any] | None,
    similar: float | None,
    inputs: SelectInputs,
) -> dict[str, Any]:
    measured = "held_out" if inputs.held_out else "compared"
    row: dict[str, Any] = {"step": which[0], "weights": which[1], "verdict": "kept", "reason": ""}
    if similar is not None:
        row["similarity"] = round(similar, 6)
    if score is not None:
        items = [_mean([losses]) for losses in score[measured]]
        row |= {"stable_loss": _mean(score[measured]), "per_level": _per_level(score[measured]), "per_item": items}
        if inputs.held_out:
            row["training_loss"] = _mean(score["compared"])
            row["gap"] = _difference(row["stable_loss"], row["training_loss"])
    problem = _veto(row, base, measured, inputs)
    if problem:
        row["verdict"], row["reason"] = "vetoed", problem
    return row


def _veto(row: dict[str, Any], base: dict[str, Any] | None, measured: str, inputs: SelectInputs) -> str | None:
    veto = inputs.veto
    loss = row.get("stable_loss")
    if "stable_loss" in row and loss is None:
        return "its loss is not a number"
    if veto.max_loss_above_base is not None and base is not None and loss is not None:
        reference = _mean(base[measured])
        if reference is not None and loss > reference + veto.max_loss_above_base:
            return f"its loss {loss:.5f} is above the base model's {reference:.5f} by more than {veto.max_loss_above_base:g}"
    if veto.max_similarity is not None and row.get("similarity", 0.0) > veto.max_similarity:
        return f"a sample is {row['similarity']:.3f} similar to a training picture (limit {veto.max_similarity:g})"
    return None


def _choose(
    inputs: SelectInputs, rows: list[dict[str, Any]], open_rows: list[dict[str, Any]]
) -> tuple[dict[str, Any] | None, str, str]:
    if inputs.pinned is not None:
        wanted = (inputs.pinned["step"], inputs.pinned["weights"])
        found = next((row for row in rows if (row["step"], row["weights"]) == wanted), None)
        return found, "chosen by hand with `runner select`", "user"
    if inputs.strategy == "manual":
        found = next((row for row in rows if row["step"] == inputs.step and row["weights"] == "raw"), None)
        return found, "selection.step in run.toml", "run.toml"
    if not open_rows:
        return None, "every checkpoint is vetoed", "runner"
    if inputs.strategy == "last":
        last = max(open_rows, key=lambda row: (row["step"], row["weights"] == "raw"))
        return last, 'the last checkpoint (strategy = "last")', "runner"
    best = min(open_rows, key=lambda row: (row["stable_loss"], row["step"]))
    for row in open_rows:
        difference, error = paired_difference(row["per_item"], best["per_item"])
        row["difference"], row["standard_error"] = difference, error
    count = len(best["per_item"])
    if count < LEAST_FOR_ERROR:
        few = f"{count} measured item{'s' * (count != 1)}, fewer than {LEAST_FOR_ERROR}: too few to allow for an error"
        return best, f"lowest stable loss, {best['stable_loss']:.5f} ({few})", "runner"
    close = [row for row in open_rows if row is best or row["difference"] <= row["standard_error"]]
    chosen = min(close, key=lambda row: (row["step"], row["stable_loss"]))
    if chosen is best:
        return best, f"lowest stable loss, {best['stable_loss']:.5f}", "runner"
    reason = (
        f"earliest within one standard error of the lowest stable loss ({best['stable_loss']:.5f} at step {best['step']}): "
        f"{chosen['stable_loss']:.5f}, {chosen['difference']:+.5f} ± {chosen['standard_error']:.5f}"
    )
    return chosen, reason, "runner"


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """Mean difference and its standard error, over pairs of the same item."""
    differences = [value - other for value, other in zip(values, reference, strict=True)]
    if len(differences) < 2:
        return (differences[0] if differences else 0.0), 0.0
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def _mean(rows: Sequence[Sequence[float]]) -> float | None:
    values = [value for row in rows for value in row]
    if not values or not all(math.isfinite(value) for value in values):
        return None
    return statistics.fmean(values)


def _per_level(rows: Sequence[Sequence[float]]) -> list[float | None]:
    return [_mean([[row[level]] for row in rows]) for level in range(len(rows[0]))] if rows else []


def _difference(value: float | None, other: float | None) -> float | None:
    return value - other if value is not None and other is not None else None
