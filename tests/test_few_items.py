"""The rule of selection by the number of measured items, and what is said of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from runner.inputs.select import LEAST_FOR_ERROR, SelectInputs
from runner.plan.compile import compile_graph
from runner.plan.render import render_plan
from runner.report.page import selection_note
from runner.stages.judge import judge
from tests.inprocess import applied, planned, prepared
from tests.support import Place, draw_pictures


@pytest.fixture
def inputs(place: Place) -> SelectInputs:
    return compile_graph(prepared(place.file)).of(SelectInputs)


def chosen(inputs: SelectInputs, count: int, errors: float) -> dict[str, Any]:
    """Of `count` items: step 2 lies so many of its own standard errors above the best, step 4; step 6 far above."""
    spread = [0.01 * (-1) ** index for index in range(count)]
    mean = sum(spread) / count
    spread = [value - mean for value in spread]
    error = math.sqrt(sum(value**2 for value in spread) / (count - 1)) / math.sqrt(count)
    best = [float(index) for index in range(1, count + 1)]
    losses = {
        0: [loss + 9 for loss in best],
        4: best,
        6: [loss + 1 for loss in best],
        2: [loss + errors * error + more for loss, more in zip(best, spread, strict=True)],
    }
    scores = {
        (step, "raw"): {"levels": [1], "held_out": [[x] for x in row], "compared": [[x] for x in row]}
        for step, row in losses.items()
    }
    return judge(inputs, [(2, "raw"), (4, "raw"), (6, "raw")], scores, {})


@pytest.mark.parametrize("count", [LEAST_FOR_ERROR, 40])
def test_one_standard_error_and_not_two(inputs: SelectInputs, count: int) -> None:
    steps = {errors: chosen(inputs, count, errors)["chosen"]["step"] for errors in (0.5, 0.95, 1.05, 1.5, 1.95, 2.5)}
    assert steps == {0.5: 2, 0.95: 2, 1.05: 4, 1.5: 4, 1.95: 4, 2.5: 4}


@pytest.mark.parametrize("count", [2, 3, LEAST_FOR_ERROR - 1])
def test_of_few_items_the_lowest_loss_is_taken(inputs: SelectInputs, count: int) -> None:
    record = chosen(inputs, count, 0.1)
    assert record["chosen"]["step"] == 4
    loss = sum(range(1, count + 1)) / count
    assert record["reason"] == (
        f"lowest stable loss, {loss:.5f} ({count} measured items, fewer than 12: too few to allow for an error)"
    )
    early = next(row for row in record["candidates"] if row["step"] == 2)
    assert early["difference"] < early["standard_error"], "both are in the table all the same"
    assert record["reason"] in selection_note(record)


def test_the_plan_says_which_rule_it_will_be(place: Place) -> None:
    def summary(**held_out: Any) -> str:
        place.write({"dataset": {"held_out": held_out or None}})
        return planned(place.file).actions["select"].summary

    assert summary(count=2) == (
        "choose among 3 candidates; measure 4 of 4 on 2 held-out items, fewer than 12: the lowest loss decides"
    )
    assert summary().endswith("on 10 training items (nothing is held out), fewer than 12: the lowest loss decides")
    draw_pictures(place.folder / "pics", 30)
    assert summary(count=12).endswith("measure 4 of 4 on 12 held-out items")
    place.write({"selection": {"strategy": "last"}})
    plan = planned(place.file)
    assert "the lowest loss decides" not in plan.actions["select"].summary
    assert render_plan


def test_it_is_in_the_record_and_the_report(place: Place) -> None:
    applied(place.file)
    record = json.loads((place.output / "selection.json").read_text(encoding="utf-8"))
    assert "(2 measured items, fewer than 12: too few to allow for an error)" in record["reason"]
    losses = {row["step"]: row["stable_loss"] for row in record["candidates"]}
    assert record["chosen"]["step"] == min(losses, key=lambda step: losses[step])
    assert "fewer than 12" in Path(place.output / "report.html").read_text(encoding="utf-8")
