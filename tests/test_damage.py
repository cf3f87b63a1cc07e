"""Whatever file of a finished run is damaged: no traceback, no other run hidden, and an apply comes to the same bytes."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runner.stages.checkpoints import Checkpoints
from runner.store.published import Published
from runner.store.training import TrainFolder
from tests.commands import said
from tests.damage import DAMAGE, copied, files_of, finished_run, flipped, kinds, sweep
from tests.support import Place, new_place, run_bytes

FAST = {
    "artifacts/select/KEY/selection.json": ["list", "flip"],
    "step-N/ema.safetensors": ["flip"],
    "step-N/manifest.json": ["table"],
    "artifacts/train/KEY/train.json": ["half"],
    "artifacts/train/KEY/workspace.json": ["list"],
    "exports/KEY/weights.safetensors": ["flip"],
    "index.sqlite": ["half"],
    "items/samples/KEY.png": ["flip", "folder"],
    "runs/KEY.json": ["table"],
    "runs/KEY.items.gz": ["half"],
    "runs/t/.published.json": ["list"],
    "runs/t/logs/events.jsonl": ["flip"],
    "runs/t/strip.png": ["folder"],
}
"""Kind of file → ways; `python -m tests.damage` does all of them."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Place:
    return finished_run(tmp_path_factory.mktemp("damage") / "place", tiny_model)


@pytest.fixture
def place(run: Place, tmp_path: Path) -> Any:
    with copied(run, tmp_path / "copy") as copy:
        yield copy


@pytest.mark.parametrize("part", FAST)
def test_a_damaged_file_is_made_again(run: Place, tmp_path: Path, part: str) -> None:
    files = [file for name, file in kinds(run, files_of(run)).items() if name.endswith(part)]
    assert len(files) == 1
    counts = sweep(run, tmp_path / "copy", files, FAST[part])
    assert set(counts) == ({"named"} if part.endswith("strip.png") else {"same"})


@pytest.mark.slow
def test_every_damaged_file_is_made_again(run: Place, tmp_path: Path) -> None:
    assert sweep(run, tmp_path / "copy", files_of(run), list(DAMAGE))["same"] > 300


def trained(place: Place) -> TrainFolder:
    return TrainFolder(next((place.folder / ".runner" / "artifacts" / "train").iterdir()))


def events(place: Place, kind: str) -> list[dict[str, Any]]:
    lines = (place.output / "logs" / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["type"] == kind]


def test_a_damaged_checkpoint_is_trained_again_up_to_it(place: Place) -> None:
    """Four steps with checkpoints at 2 and 4: that of step 2 takes two steps, not four, and no later one changes."""
    before = run_bytes(place.output)
    file = Checkpoints(trained(place).checkpoints).path(2)
    flipped(file)
    flipped(place.output / "strip.png")  # something to do, so that apply looks
    steps = len(events(place, "step"))
    result = said(place, "apply", "--yes")
    assert result.code == 0, result.err
    assert run_bytes(place.output) == before
    again = events(place, "step")[steps:]
    assert [event["step"] for event in again] == [1, 2]
    texts = [event["text"] for event in events(place, "warning")]
    assert texts == [
        f"the checkpoint of step 2 is damaged: {file}: it is not what was written; it is trained again",
        "the finished training is damaged; it goes on from its last state",
        "gone or damaged: the checkpoint of step 2; trained again up to step 2",
    ]


def test_nothing_damaged_is_exported(place: Place) -> None:
    """A copy of the file in the store is damaged, its other names are not: export finds it, and the next plan knows."""
    file = Checkpoints(trained(place).checkpoints).path(2)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()
    file.write_bytes(content)
    assert said(place, "plan", "--detailed-exitcode").code == 0, "nobody has read it yet"
    refused = said(place, "export", "run.toml", "--checkpoint", "2", "--format", "diffusers", "--to", "out.safetensors")
    assert refused.code == 1
    assert refused.err.endswith(
        f"error: the checkpoint of step 2 is damaged: {file}: it is not what was written\n"
        "hint: `runner apply` trains it again\n\n"
    )
    plan = said(place, "plan", "--detailed-exitcode")
    assert plan.code == 2
    assert "make the checkpoint of step 2 again: 2 steps" in plan.out
    assert said(place, "apply", "--yes").code == 0
    assert (
        said(place, "export", "run.toml", "--checkpoint", "2", "--format", "diffusers", "--to", "out.safetensors").code
        == 0
    )


def test_a_lost_checkpoint_of_a_training_that_keeps_some(tmp_path: Path, tiny_model: Path) -> None:
    """Only the record knows which were kept; those that were dropped do not come back."""
    place = new_place(tmp_path / "place", tiny_model, pictures=6)
    place.write({"training": {"max_train_steps": 6, "checkpoints": {"every_n_steps": 1, "keep": 2}}})
    assert said(place, "apply", "--yes").code == 0
    kept, before = trained(place).checkpoint_steps(), run_bytes(place.output)
    assert len(kept) in (2, 3)
    shutil.rmtree(trained(place).checkpoints / f"step-{kept[0]:08d}")
    result = said(place, "apply", "--yes")
    assert result.code == 0, result.err
    assert trained(place).checkpoint_steps() == kept
    assert run_bytes(place.output) == before


def test_leftovers_of_a_kill_go_where_nothing_else_is_to_do(place: Place) -> None:
    """In the store, in the run's folder, and beside what is published: there only under our own names."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    store, published = place.folder / ".runner", place.folder / "published"
    left = [
        store / "exports" / f".tmp-{dead.pid}-key",
        store / "items" / "text" / f".tmp-{dead.pid}-x",
        place.output / f".tmp-{dead.pid}-y",
    ]
    own, foreign = published / f".tmp-{dead.pid}-u.safetensors", published / f".tmp-{dead.pid}-v.safetensors"
    for path in (*left, own, foreign):
        path.write_bytes(b"x")
    note = Published.read(place.output)
    note.intended[str(published / "u.safetensors")] = "digest"  # what a kill leaves noted
    note.write(place.output)
    result = said(place, "apply")
    assert "Nothing to do" in result.err
    assert [path.exists() for path in (*left, own, foreign)] == [False, False, False, False, True]


def test_strange_names_in_the_store_are_none_of_ours(place: Place) -> None:
    folder = trained(place)
    for parent, name in (
        (folder.checkpoints, "step-foo"),
        (folder.states, "state-foo"),
        (folder.checkpoints, "step-1"),
    ):
        (parent / name).mkdir()
    (folder.checkpoints / "step-00000003").write_text("a file")
    assert folder.checkpoint_steps() == [2, 4]
    assert folder.newest_step() == 4
    assert said(place, "plan", "--detailed-exitcode").code == 0
    assert said(place, "status", ".").code == 0


def test_a_broken_run_hides_no_other(place: Place) -> None:
    """status shows the others, gc names it and deletes nothing; an apply of it mends it."""
    store = place.folder / ".runner"
    record = next((store / "runs").glob("*.json"))
    broken = record.with_name("0" * 16 + ".json")
    shutil.copy(record, broken)
    flipped(broken)
    (store / "exports" / "unused").mkdir()
    shown = said(place, "status", ".")
    assert shown.code == 0
    assert shown.err == (
        f"note: the record of a run is damaged: {broken} (it is not what was written); apply it again, or delete the record\n"
    )
    assert "finished" in shown.out
    for arguments in (("gc", "."), ("gc", ".", "--delete")):
        listed = said(place, *arguments)
        assert listed.code == 0
        assert listed.err == (
            f"note: the record of a run is damaged: {broken} (it is not what was written)\n"
            "note: nothing is deleted: apply those runs again, or delete the records of runs that are gone\n"
            "nothing to delete\n"
        )
    broken.unlink()
    assert "exports" in said(place, "gc", ".").out


def test_what_was_published_is_not_known(place: Place) -> None:
    """Without its note nobody knows which exports a run's links need."""
    (place.output / ".published.json").write_text("[]")
    (place.folder / ".runner" / "exports" / "unused").mkdir()
    listed = said(place, "gc", ".", "--delete")
    assert "note: what run 't' has published is not known; no export is deleted\n" in listed.err
    assert len(list((place.folder / ".runner" / "exports").iterdir())) == 5


@pytest.mark.parametrize(
    ("name", "content", "reason", "way_out"),
    [
        ("pin.json", "[]", "it is no JSON object", "choose again with `runner select --step`"),
        (
            "pin.json",
            '{"step": "2", "weights": "raw"}',
            "step has another type",
            "choose again with `runner select --step`",
        ),
        (
            "pin.json",
            '{"step": 0, "weights": "raw"}',
            "no checkpoint is called so",
            "choose again with `runner select --step`",
        ),
        (
            "pin.json",
            '{"step": 2, "weights": "../x"}',
            "no checkpoint is called so",
            "choose again with `runner select --step`",
        ),
        (
            "pin.json",
            '{"step": 2, "weights": "raw", "train": 5}',
            "train has another type",
            "choose again with `runner select --step`",
        ),
        ("pin.json", "", "it is empty", "choose again with `runner select --step`"),
        ("seeds.json", "{}", "seeds is missing", "new seeds are drawn at the next apply"),
        ("seeds.json", '{"seeds": {"0": -5}}', "its seeds are no numbers", "new seeds are drawn at the next apply"),
        ("seeds.json", '{"seeds": {"0": 1e999}}', "its seeds are no numbers", "new seeds are drawn at the next apply"),
        (
            "seeds.json",
            '{"seeds": {"0": 4294967296}}',
            "its seeds are no numbers",
            "new seeds are drawn at the next apply",
        ),
        ("seeds.json", '{"seeds": {"-1": 5}}', "its seeds are no numbers", "new seeds are drawn at the next apply"),
        ("seeds.json", '{"seeds": {"a": 1}}', "its seeds are no numbers", "new seeds are drawn at the next apply"),
    ],
)
def test_what_nothing_else_knows_is_named(place: Place, name: str, content: str, reason: str, way_out: str) -> None:
    file = place.output / name
    file.write_text(content)
    for command in ("plan", "apply"):
        result = said(place, command)
        assert result.code == 3
        assert result.err == f"error: {file} is damaged: {reason}\nhint: delete it; {way_out}\n\n"
    file.unlink()
    assert said(place, "plan", "--detailed-exitcode").code == 0


def test_a_choice_of_what_is_not_there_is_named_when_planning(place: Place) -> None:
    file = place.output / "pin.json"
    file.write_text('{"step": 3, "weights": "raw"}')
    for command in ("plan", "apply"):
        result = said(place, command)
        assert result.code == 3
        assert result.err == (
            f"error: {file} chooses what this training has not: checkpoint 3 (raw)\n"
            "hint: delete it, or choose again with `runner select --step`; checkpoints are at steps 2, 4\n\n"
        )
    assert said(place, "select", "run.toml", "--step", "2").code == 0
    assert said(place, "plan", "--detailed-exitcode").code == 0


@pytest.mark.parametrize(
    "files",
    [
        {"a\0b": [1, 2, "x"]},
        {"a": [1e999, 2, "x"]},
        {"a": [1, 2, 5]},
        {"a" * 300: [1, 2, "x"]},
        {"\ud800": [1, 2, "x"]},
    ],
)
def test_files_that_nobody_published(place: Place, files: dict[str, Any]) -> None:
    (place.output / ".published.json").write_text(json.dumps({"fingerprint": "", "files": files, "intended": {}}))
    assert "everything is up to date" not in said(place, "plan").out
    assert "what run 't' has published is not known" in said(place, "gc", ".").err
    assert said(place, "apply").code == 0
    assert said(place, "plan", "--detailed-exitcode").code == 0


def test_what_was_given_last_is_what_a_run_was_applied_with(place: Place) -> None:
    """Also where there was nothing to do."""
    log = "training.logging.every_n_steps=7"
    assert "Nothing to do" in said(place, "apply", "--set", log).err
    assert f"applied with --set {log}" in said(place, "status", ".").out
    assert "Nothing to do" in said(place, "apply").err
    assert "applied with" not in said(place, "status", ".").out
    assert "last applied with" not in said(place, "plan").out
    place.file.write_text(place.file.read_text() + "\n# a word\n")
    assert "was edited since it was applied" in said(place, "status", ".").out
    assert "Nothing to do" in said(place, "apply").err
    assert "was edited" not in said(place, "status", ".").out


def test_a_damaged_record_is_said_once(place: Place) -> None:
    file = next((place.folder / ".runner" / "artifacts" / "select").iterdir()) / "selection.json"
    flipped(file)
    result = said(place, "plan")
    assert result.err == f"note: {file} is damaged (it is not what was written); it is made again\n"
    assert not logging.getLogger("runner").handlers


def test_older_records_have_no_digest(place: Place) -> None:
    """Stores of older runners stay valid: there is nothing to hold their files against."""
    folder = trained(place)
    for step in (2, 4):
        (folder.checkpoints / f"step-{step:08d}" / "manifest.json").unlink()
    record = json.loads((folder.path / "train.json").read_text())
    del record["sha256"]
    (folder.path / "train.json").write_text(json.dumps(record))
    assert said(place, "plan", "--detailed-exitcode").code == 0
