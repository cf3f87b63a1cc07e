"""Choosing: vetoes, the paired rule, choices by hand; and what is published never overwrites what is not ours."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runner.errors import RunFailed
from runner.inputs.select import SelectInputs
from runner.plan.compile import compile_graph
from runner.stages.judge import Candidate, judge, paired_difference
from schemas.selection import Veto
from tests.inprocess import applied, prepared
from tests.support import Place


@pytest.fixture
def inputs(place: Place) -> SelectInputs:
    return compile_graph(prepared(place.file)).of(SelectInputs)


def scores(table: dict[int, list[float]]) -> dict[Candidate, dict[str, Any]]:
    """Step → loss of each item, the same at both levels."""
    return {
        (step, "raw"): {
            "levels": [1, 2],
            "held_out": [[loss, loss] for loss in losses],
            "compared": [[loss, loss] for loss in losses],
        }
        for step, losses in table.items()
    }


def chosen(
    inputs: SelectInputs, table: dict[int, list[float]], similarity: dict[int, float] | None = None
) -> dict[str, Any]:
    candidates = [(step, "raw") for step in table if step > 0]
    similar = {(step, "raw"): value for step, value in (similarity or {}).items()}
    return judge(inputs, candidates, scores(table), similar)


def test_the_lowest_loss_wins(inputs: SelectInputs) -> None:
    record = chosen(inputs, {0: [1.0, 1.2], 2: [0.9, 1.1], 4: [0.5, 0.71], 6: [0.7, 0.9]})
    assert record["chosen"] == {"step": 4, "weights": "raw"}
    assert record["reason"].startswith("lowest stable loss, 0.60500")
    assert record["decided_by"] == "runner"
    row = next(row for row in record["candidates"] if row["step"] == 6)
    assert row["difference"] == pytest.approx(0.195)
    assert row["standard_error"] == pytest.approx(0.005)
    assert record["base"]["stable_loss"] == pytest.approx(1.1)


def test_the_earliest_within_one_paired_error_is_taken(inputs: SelectInputs) -> None:
    """The items differ by far more than the checkpoints do; only pairs tell them apart."""
    spread = [0.01, -0.01] * 6
    best = [1.0, 9.0, 5.0] * 4
    table = {0: [loss + 1 for loss in best], 2: [loss + 0.1 for loss in best], 6: best}
    table[4] = [loss + 0.001 + more for loss, more in zip(best, spread, strict=True)]
    table = dict(sorted(table.items()))
    record = chosen(inputs, table)
    assert record["chosen"]["step"] == 4
    assert record["reason"].startswith(
        "earliest within one standard error of the lowest stable loss (5.00000 at step 6)"
    )
    assert paired_difference([1, 2, 3], [0, 1, 2]) == (1.0, 0.0)
    assert paired_difference([1.0], [0.5]) == (0.5, 0.0)


def test_vetoes(inputs: SelectInputs) -> None:
    nan = chosen(inputs, {0: [1.0, 1.0], 2: [0.9, 0.9], 4: [float("nan"), 0.1]})
    assert nan["chosen"]["step"] == 2
    assert [row["verdict"] for row in nan["candidates"]] == ["chosen", "vetoed"]
    assert nan["candidates"][1]["reason"] == "its loss is not a number"
    json.dumps(nan, allow_nan=False)
    strict = replace(inputs, veto=Veto(max_loss_above_base=0.05, max_similarity=0.9))
    record = chosen(strict, {0: [1.0, 1.0], 2: [1.2, 1.2], 4: [0.5, 0.5], 6: [0.6, 0.6]}, {4: 0.95, 6: 0.3, 2: 0.1})
    assert record["chosen"]["step"] == 6
    reasons = {row["step"]: row["reason"] for row in record["candidates"]}
    assert reasons[2] == "its loss 1.20000 is above the base model's 1.00000 by more than 0.05"
    assert reasons[4] == "a sample is 0.950 similar to a training picture (limit 0.9)"
    assert chosen(strict, {0: [1.0, 1.0], 2: [9.0, 9.0]})["chosen"] is None


def test_strategies(inputs: SelectInputs) -> None:
    table = {0: [1.0, 1.0], 2: [0.5, 0.5], 4: [0.9, 0.9]}
    assert chosen(replace(inputs, strategy="last"), table)["chosen"]["step"] == 4
    assert chosen(replace(inputs, strategy="manual", step=2), table)["decided_by"] == "run.toml"
    pinned = chosen(replace(inputs, pinned={"step": 4, "weights": "raw"}), table)
    assert (pinned["chosen"]["step"], pinned["decided_by"], pinned["strategy"]) == (4, "user", "manual")
    assert chosen(replace(inputs, strategy="manual", step=3), table)["chosen"] is None


def test_scores_do_not_depend_on_company(place: Place) -> None:
    """One held-out item measured alone or among three has the same loss under the same noise."""
    found = {}
    for count in (1, 3):
        place.write({"dataset": {"held_out": {"count": count}}, "training": {"max_train_steps": 1}})
        applied(place.file)
        run = prepared(place.file)
        score = json.loads(
            run.store.item("scores", compile_graph(run).of(SelectInputs).score_key(0, "raw")).read_text()
        )
        found[count] = dict(zip((item.digest for item in run.collection.held_out), score["held_out"], strict=True))
    assert (len(found[1]), len(found[3])) == (1, 3)
    for digest, losses in found[1].items():
        assert found[3][digest] == losses


def test_without_held_out_items_it_says_so(place: Place) -> None:
    place.write({"dataset": {"held_out": None}})
    record = applied(place.file).selection
    assert record["measured_on"] == "training items (nothing is held out)"
    html = (place.output / "report.html").read_text()
    assert "nothing is held out" in html


def test_select_by_hand_and_back(place: Place) -> None:
    place.write({"selection": {"publish": [{"directory": "pub", "mode": "copy", "name": "x"}]}})
    place.run("apply").ok()
    rule = json.loads((place.output / "selection.json").read_text())["chosen"]["step"]
    other = next(step for step in (2, 4, 6) if step != rule)
    before = (place.folder / "pub" / "x.safetensors").read_bytes()
    lock = (place.folder / "run.lock").read_text()
    place.run("select", "--step", str(other)).ok()
    assert json.loads((place.output / "selection.json").read_text())["decided_by"] == "user"
    assert (place.folder / "pub" / "x.safetensors").read_bytes() != before
    assert (place.folder / "pub" / "x.safetensors").read_bytes() == (place.output / "best.safetensors").read_bytes()
    assert (place.folder / "run.lock").read_text() != lock
    assert place.run("plan", "--detailed-exitcode").code == 0
    wrong = place.run("select", "--step", "5")
    assert wrong.code == 3
    assert "there is no checkpoint 5 (raw)\nhint: checkpoints are at steps 2, 4, 6" in wrong.err
    place.run("select").ok()
    assert (place.folder / "pub" / "x.safetensors").read_bytes() == before
    assert (place.folder / "run.lock").read_text() == lock


def test_publishing_never_overwrites_what_is_not_ours(place: Place) -> None:
    (place.folder / "pub").mkdir()
    foreign = place.folder / "pub" / "t.safetensors"
    foreign.write_bytes(b"somebody's")
    place.write({"selection": {"publish": [{"directory": "pub", "mode": "copy"}]}})
    result = place.run("apply")
    assert result.code == 1
    assert "is there and was not written by this run; it is left as it is" in result.err
    assert foreign.read_bytes() == b"somebody's"
    foreign.unlink()
    place.run("apply").ok()
    assert foreign.read_bytes() == (place.output / "best.safetensors").read_bytes()
    foreign.write_bytes(b"edited")
    assert place.run("plan", "--detailed-exitcode").code == 2
    assert place.run("apply").code == 1
    assert foreign.read_bytes() == b"edited"


def test_links_all_and_names(place: Place) -> None:
    publish = [
        {"directory": "links", "mode": "symlink", "which": "all", "name": "n-{step}"},
        {"directory": "peft", "format": "diffusers", "mode": "copy"},
        {"directory": "whole", "format": "single_file", "mode": "symlink"},
    ]
    place.write({"selection": {"publish": publish}})
    place.run("apply").ok()
    assert sorted(path.name for path in (place.folder / "links").iterdir()) == [
        f"n-{step}.safetensors" for step in (2, 4, 6)
    ]
    assert all(path.is_symlink() and path.exists() for path in (place.folder / "links").iterdir())
    assert (place.folder / "whole" / "t.safetensors").is_symlink()
    os.unlink(place.folder / "links" / "n-4.safetensors")
    plan = place.run("plan")
    assert "links/n-4.safetensors is gone" in plan.out
    place.run("apply").ok()
    assert (place.folder / "links" / "n-4.safetensors").exists()


def test_where_links_are_not_allowed_copies_are_made_and_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError("not allowed")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    place.write({"selection": {"publish": [{"directory": "pub", "mode": "symlink"}]}})
    outcome = applied(place.file)
    assert [note for note in outcome.notes if "symbolic links are not allowed here, a copy was made" in note]
    assert (place.folder / "pub" / "t.safetensors").is_file()


def test_everything_vetoed_is_an_error(place: Place) -> None:
    place.write({"selection": {"veto": {"max_similarity": 0.001}}})
    with pytest.raises(RunFailed, match="nothing can be selected: every checkpoint is vetoed"):
        applied(place.file)


def test_the_report_is_whole_in_one_file(finished: Place) -> None:
    html = (finished.output / "report.html").read_text()
    for part in (
        "data:image/png;base64,",
        "<svg",
        'type="range"',
        "prefers-color-scheme: dark",
        "viewport",
        "Resolved configuration",
    ):
        assert part in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "https://" not in html
    assert 'src="/' not in html
    strip = Image.open(finished.output / "strip.png")
    assert strip.width > strip.height > 100


def test_a_caption_cannot_write_into_the_report(place: Place) -> None:
    place.write({"sampling": {"prompts": [{"prompt": "<script>alert(1)</script>"}]}})
    applied(place.file)
    assert "<script>alert(1)" not in (place.output / "report.html").read_text()
