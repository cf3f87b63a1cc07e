"""Verbs that work on a run take what its folder last applied, its --set included, and refuse another training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.inprocess import Verbs, applied, planned, prepared, verb
from tests.support import Place, new_place

__all__ = ["verb"]
RATE = "training.learning_rate=1e-2"
AS_APPLIED = f"note: run 't' as it was last applied, with --set {RATE}\n"


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Place:
    """Applied as the file says, then with another learning rate."""
    made = new_place(tmp_path_factory.mktemp("twice") / "place", tiny_model)
    applied(made.file)
    applied(made.file, RATE)
    return made


@pytest.fixture
def done(twice: Place, tmp_path: Path) -> Place:
    """A copy of `twice` to change."""
    shutil.copytree(twice.folder, tmp_path / "done", symlinks=True)
    return Place(tmp_path / "done")


def weights(place: Place, step: int, *settings: str) -> bytes:
    """A checkpoint in Kohya's format, of the training of the file with settings."""
    from runner.plan.diff import current_graph

    run = prepared(place.file, *settings)
    folder = run.store.artifact("train", current_graph(run).fingerprint("train"))
    return (folder / "checkpoints" / f"step-{step:08d}" / "raw.safetensors").read_bytes()


def test_export_takes_what_was_applied(done: Place, verb: Verbs) -> None:
    result = verb(done, "export", "run.toml", "--format", "kohya", "--to", "a.safetensors", "--checkpoint", "last").ok()
    assert result.err == AS_APPLIED
    with_rate = verb(
        done, "export", "--set", RATE, "--format", "kohya", "--to", "b.safetensors", "--checkpoint", "last"
    )
    assert with_rate.ok().err == AS_APPLIED
    assert (done.folder / "a.safetensors").read_bytes() == (done.folder / "b.safetensors").read_bytes()
    assert weights(done, 6) != weights(done, 6, RATE)
    from safetensors import safe_open

    with safe_open(done.folder / "a.safetensors", "pt") as file:
        assert float(file.metadata()["ss_learning_rate"]) == 1e-2


def test_another_set_is_refused_by_every_verb(done: Place, verb: Verbs) -> None:
    other = ("--set", "training.learning_rate=0.5")
    for arguments in (
        ("export", *other, "--format", "kohya", "--to", "a.safetensors"),
        ("select", *other),
        ("report", *other),
        ("sample", *other),
    ):
        result = verb(done, arguments[0], "run.toml", *arguments[1:])
        assert result.code == 3
        assert result.err == (
            "error: this is not what run 't' last applied:\n"
            "  training.learning_rate 0.01 → 0.5\n"
            "hint: runner apply run.toml --set training.learning_rate=0.5, or leave that --set out\n\n"
        )
        assert result.out == ""


def test_an_edited_file_is_refused_by_every_verb(done: Place, verb: Verbs) -> None:
    done.file.write_text(done.file.read_text().replace("max_train_steps = 6", "max_train_steps = 8"))
    for arguments in (("export", "--format", "kohya", "--to", "a.safetensors"), ("select",), ("report",), ("sample",)):
        result = verb(done, arguments[0], "run.toml", *arguments[1:])
        assert result.code == 3
        assert result.err == (
            "error: this is not what run 't' last applied:\n"
            "  training.max_train_steps 6 → 8\n"
            f"hint: runner apply run.toml --set {RATE}, or add --set training.max_train_steps=6 for what was applied\n\n"
        )
    assert verb(done, "report", "--set", "training.max_train_steps=6").ok().err.startswith("note: run 't' as it was")


def test_another_dataset_is_refused(done: Place, verb: Verbs) -> None:
    (done.folder / "pics" / "0.txt").write_text("something else")
    assert verb(done, "report").err == (
        "error: this is not what run 't' last applied:\n"
        "  1 caption edited (pics/0.png)\n"
        f"hint: runner apply run.toml --set {RATE}, or take the change back\n\n"
    )


def test_report_and_best_need_the_choice_that_was_applied(done: Place, verb: Verbs) -> None:
    done.file.write_text(done.file.read_text() + '\n[selection]\nstrategy = "last"\n')
    said = (
        "error: this is not what run 't' last applied:\n"
        '  selection.strategy "best" → "last"\n'
        f"hint: runner apply run.toml --set {RATE}, or add --set 'selection.strategy=\"best\"' for what was applied\n\n"
    )
    assert verb(done, "report").err == said
    assert verb(done, "export", "--format", "kohya", "--to", "a.safetensors").err == said
    verb(done, "export", "--format", "kohya", "--to", "a.safetensors", "--checkpoint", "last").ok()
    assert "chosen: step 6" in verb(done, "select").ok().out


def test_select_report_and_sample_take_what_was_applied(done: Place, verb: Verbs) -> None:
    chosen = verb(done, "select", "--step", "2").ok()
    assert chosen.out == "chosen: step 2 (chosen by hand with `runner select`)\n"
    assert AS_APPLIED in chosen.err
    assert json.loads((done.output / "resolved.json").read_text())["training"]["learning_rate"] == 1e-2
    assert 'training.learning_rate" = "1e-2"' in (done.folder / "run.lock").read_text()
    assert planned(done.file, RATE).pending is False
    assert verb(done, "report").ok().err == AS_APPLIED
    made = verb(done, "sample", "--checkpoint", "2", "--set", "sampling.width=16", "--set", "sampling.height=16").ok()
    assert AS_APPLIED in made.err
    assert Path(made.out.strip()).is_file()


def test_runs_applied_before_settings_were_recorded(done: Place, verb: Verbs) -> None:
    record = next((done.folder / ".runner" / "runs").glob("*.json"))
    content = json.loads(record.read_text())
    for name in ("sha256", "settings", "file_digest", "complete", "shown"):
        content.pop(name)
    record.write_text(json.dumps(content))
    assert verb(done, "report").err == (
        "error: this is not what run 't' last applied:\n"
        "  training.learning_rate 0.01 → 0.001\n"
        "hint: runner apply run.toml, or add --set training.learning_rate=0.01 for what was applied\n\n"
    )
    assert verb(done, "report", "--set", RATE).ok().err == ""


def test_a_run_that_was_named_by_a_set(place: Place, verb: Verbs) -> None:
    applied(place.file, "run.name=other", "training.max_train_steps=2", until="cache")
    result = verb(place, "select", "run.toml")
    assert result.code == 3
    assert result.err == (
        "note: run.toml was applied as run 'other'; that run is named by --set run.name=other\n"
        "error: training is not finished, there is nothing to choose from\nhint: runner apply run.toml\n\n"
    )


def test_the_plan_says_what_the_last_apply_had(done: Place) -> None:
    assert planned(done.file).notes == [f"the run was last applied with --set {RATE}; this plan is without it"]
    assert planned(done.file, RATE).notes == []
