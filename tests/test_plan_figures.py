"""The figures under a plan are true, and said in whole words."""

from __future__ import annotations

import re
from typing import Any

import pytest

from runner.plan.estimate import figures
from runner.plan.render import plan_record, render_fit, render_plan, size_text
from runner.plan.speed import step_key
from tests.inprocess import planned
from tests.support import Place, draw_pictures


def row(place: Place, name: str, **training: Any) -> str:
    """A row of the plan's figures."""
    place.write({"training": training})
    plan = planned(place.file)
    text = render_plan(plan, figures(plan, None))
    found = re.search(rf"^  {name} +(.*)$", text, re.MULTILINE)
    assert found is not None, text
    return found.group(1)


@pytest.mark.parametrize(
    ("accumulation", "words"),
    [  # eight training pictures in batches of two: four batches an epoch
        (1, "6 in all, 4 steps an epoch; 1.50 epochs"),
        (2, "6 in all, 2 steps an epoch of 2 batches; 3.00 epochs"),
        (3, "6 in all, 2 steps an epoch of 3 batches, the last of 1; 3.00 epochs"),
        (4, "6 in all, 1 step an epoch of 4 batches; 6.00 epochs"),
        (
            8,
            "6 in all, 1 step an epoch of 4 batches (an epoch has no more, and its rest is not carried on: "
            "gradient_accumulation_steps = 8 is never reached); 6.00 epochs",
        ),
    ],
)
def test_steps_are_of_as_many_batches_as_they_have(place: Place, accumulation: int, words: str) -> None:
    assert row(place, "steps", gradient_accumulation_steps=accumulation) == words


@pytest.mark.parametrize(
    ("checkpoints", "words"),
    [
        ({"every_n_steps": 2}, "3, one each 2 steps"),
        ({"every_n_steps": 4}, "2, one each 4 steps and at the end"),
        ({"every_n_steps": 1}, "6, one each step"),
        ({"every_n_steps": 6}, "1, at the end"),
        ({"every_n_steps": 9}, "1, at the end"),
        ({"every_n_steps": 1, "keep": 2}, "6, one each step; kept are the newest 2 and the best of those before"),
        ({"every_n_steps": 2, "keep": 1}, "3, one each 2 steps; kept are the newest one and the best of those before"),
        ({"every_n_steps": 2, "keep": 3}, "3, one each 2 steps"),
    ],
)
def test_checkpoints_that_are_made_and_kept(place: Place, checkpoints: dict[str, int], words: str) -> None:
    assert row(place, "checkpoints", checkpoints=checkpoints) == words


def test_one_memory_figure_that_says_of_what(place: Place) -> None:
    """In the plan, under --fit, and in the record; libraries included."""
    from runner.plan.fit import fit

    for device, words in ((None, "on the CPU, 0.5 GB"), ("cuda", "on a GPU, 0.9 GB")):
        plan = planned(place.file)
        numbers = figures(plan, None, device)  # type: ignore[arg-type]
        text = render_plan(plan, numbers)
        libraries = {"cuda": 900_000_000, None: 500_000_000}[device]
        assert numbers.peak == numbers.memory.peak + libraries
        assert (
            f"  memory       {size_text(numbers.peak)} predicted at the peak ({numbers.memory.highest}) {words} for the libraries included"
            in text
        )
        record = plan_record(plan, numbers)["figures"]
        assert record["predicted_peak_memory_bytes"] == numbers.peak
        assert record["memory_of"] == ("GPU" if device else "CPU")
    said = render_fit(fit(plan, 8 * 10**9))
    assert (
        said
        == f"\nPredicted peak on a GPU, 0.9 GB for the libraries included: {size_text(numbers.peak)} as it is. It fits into 8.00 GB."
    )


def test_plan_and_fit_on_the_command_line_say_the_same(place: Place) -> None:
    text = place.run("plan", "--fit", "8").ok().out
    sizes = re.findall(r"([\d.]+ [GM]B) (?:predicted at the peak|as it is)", text)
    assert len(sizes) == 2
    assert sizes[0] == sizes[1]
    assert text.count("on a GPU") == 2
    assert "on the CPU" not in text


def test_one_stage_has_something_to_do(finished: Place) -> None:
    plan = planned(finished.file, 'selection.publish=[{ directory = "out", mode = "copy" }]')
    assert render_plan(plan, figures(plan, None)).endswith("1 of 6 stages has something to do.")


def test_samples_between_checkpoints_take_room(place: Place) -> None:
    def samples(**sampling: Any) -> int:
        place.write({"sampling": {"width": 64, "height": 64, **sampling}})
        return figures(planned(place.file), None).disk["samples"]

    each = samples() // 4  # of the base model and three checkpoints
    assert samples(every_n_steps=2) == 4 * each
    assert samples(every_n_steps=1) == 7 * each


def test_another_setting_is_another_step(place: Place) -> None:
    """The seconds of a step are those of steps that are alike."""
    keys = [step_key(planned(place.file).graph)]
    for change in (
        "training.memory.blocks_to_swap=1",
        "training.memory.activation_offload=true",
        'model.quantization="fp8"',
        'training.optimizer.type="lion"',
        "training.memory.gradient_checkpointing=true",
        'caching.latents="off"',
        "dataset.batch_size=1",
        "training.gradient_accumulation_steps=2",
    ):
        keys.append(step_key(planned(place.file, change).graph))
    assert len(set(keys)) == len(keys)


def test_items_that_train_and_those_beside_them(place: Place) -> None:
    assert row(place, "items") == "8, 2 held out beside them"
    place.write({"dataset": {"held_out": None, "sources": [{"path": "pics"}, {"path": "reg", "regularization": True}]}})
    draw_pictures(place.folder / "reg", 3)
    plan = planned(place.file)
    assert "  items        13 (3 of them for regularization)\n" in render_plan(plan, figures(plan, None))
