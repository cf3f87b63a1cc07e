"""Plans: what is reused and why the rest is not, exact figures, plan files, locks, and that planning needs no torch."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runner.plan.estimate import figures
from runner.plan.render import render_plan
from tests.inprocess import actions, applied, planned, prepared
from tests.support import ROOT, Place, draw_pictures, new_place


@pytest.fixture
def done(finished: Place, tmp_path: Path) -> Place:
    """A copy of a finished run that a test may change."""
    folder = tmp_path / "done"
    shutil.copytree(finished.folder, folder, symlinks=True)
    return Place(folder)


NOTHING = {"cache.latents": "=", "cache.text": "=", "train": "=", "sample": "=", "select": "=", "publish": "="}


def reasons(place: Place, node: str, *settings: str) -> list[str]:
    return planned(place.file, *settings).actions[node].reasons


def test_a_first_plan_and_a_second(place: Place) -> None:
    plan = planned(place.file)
    assert set(actions(plan).values()) == {"+"}
    assert plan.actions["cache.latents"].summary == "encode 10 pictures"
    assert plan.actions["train"].summary == "train 6 steps"
    applied(place.file)
    assert actions(planned(place.file)) == NOTHING


def test_one_edited_caption_encodes_one_caption(done: Place) -> None:
    item = prepared(done.file).collection.items[0]
    Path(item.path).with_suffix(".txt").write_text("something else altogether")
    plan = planned(done.file)
    assert plan.actions["cache.text"].missing == 1
    assert "reuse" in plan.actions["cache.text"].summary
    assert plan.actions["cache.latents"].missing == 0
    assert actions(plan)["train"] == "-/+"
    assert plan.actions["train"].reasons == [f"1 caption edited ({item.name})"]
    assert plan.throws_away == "6 trained steps of run 't'"


def test_one_replaced_picture_of_the_same_name_and_size_encodes_one_picture(done: Place) -> None:
    item = prepared(done.file).collection.items[0]
    before = Path(item.path).stat()
    picture = Image.open(item.path).convert("RGB").transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    picture.save(item.path)
    assert Path(item.path).stat().st_ino == before.st_ino
    plan = planned(done.file)
    assert plan.actions["cache.latents"].missing == 1
    assert plan.actions["cache.text"].missing == 0
    assert actions(plan)["train"] == "-/+"


@pytest.mark.parametrize(
    "setting",
    [
        "dataset.batch_size=3",
        "training.logging.every_n_steps=2",
        "training.logging.tensorboard=true",
        "dataset.workers=0",
        "training.learning_rate=5e-4",
        "network.rank=8",
        "training.optimizer.weight_decay=0.5",
    ],
)
def test_what_re_encodes_nothing(done: Place, setting: str) -> None:
    plan = planned(done.file, setting)
    assert plan.actions["cache.latents"].missing == 0
    assert plan.actions["cache.text"].missing == 0
    if setting.startswith(("training.logging", "dataset.workers")):
        assert actions(plan) == NOTHING
    else:
        assert actions(plan)["train"] == "-/+"
        assert any(reason.startswith(setting.split("=")[0]) for reason in plan.actions["train"].reasons)


def test_reasons_name_the_key_and_both_values(done: Place) -> None:
    assert reasons(done, "train", "training.learning_rate=5e-4") == ["training.learning_rate 0.001 → 0.0005"]
    assert reasons(done, "cache.latents", "dataset.resolution=16") == ["dataset.resolution 32 → 16"]
    plan = planned(done.file, "dataset.resolution=16")
    assert plan.actions["cache.latents"].missing == plan.actions["cache.latents"].total


def test_a_longer_run_extends_under_a_constant_schedule(done: Place) -> None:
    plan = planned(done.file, "training.max_train_steps=9")
    assert plan.actions["train"].symbol == "~"
    assert plan.actions["train"].summary == "extend 6 → 9 steps"
    assert plan.actions["train"].missing == 3
    assert plan.throws_away is None


def test_an_extension_gives_the_bytes_of_a_run_that_was_long_from_the_start(
    done: Place, tiny_model: Path, tmp_path: Path
) -> None:
    applied(done.file, "training.max_train_steps=9")
    long = new_place(tmp_path / "long", tiny_model)
    applied(long.file, "training.max_train_steps=9")
    name = "checkpoints/step-00000009"
    files = [next((folder / "runs" / "t").glob(f"{name}*")) for folder in (done.folder, long.folder)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_longer_run_under_a_schedule_with_a_horizon_is_replaced_and_says_why(place: Place) -> None:
    place.write({"training": {"scheduler": {"type": "cosine"}}})
    applied(place.file, until="train")
    plan = planned(place.file, "training.max_train_steps=9")
    assert plan.actions["train"].symbol == "-/+"
    assert plan.actions["train"].reasons == [
        "training.max_train_steps 6 → 9",
        'the schedule "cosine" depends on the length',
    ]


def test_figures_are_exact(place: Place) -> None:
    draw_pictures(place.folder / "wide", 5, seed=9)
    for file in (place.folder / "wide").glob("*.png"):
        Image.open(file).resize((64, 32)).save(file)
    place.write(
        {
            "dataset": {
                "batch_size": 2,
                "held_out": None,
                "sources": [{"path": "pics"}, {"path": "wide", "repeats": 3}],
            },
            "training": {
                "max_train_steps": None,
                "max_train_epochs": 3,
                "gradient_accumulation_steps": 4,
                "checkpoints": {"every_n_epochs": 1, "every_n_steps": None},
            },
        }
    )
    found = figures(planned(place.file), 2.0)
    # 10 uses of 32x32 are 5 batches; 15 uses of the wide bucket are 8, of which the last is short: 13 in all, 4 steps.
    assert [count for _, _, count in found.batches_per_epoch] == [5, 8]
    assert (found.steps_per_epoch, found.steps, found.checkpoints, found.items) == (4, 12, 3, 15)
    assert found.seconds == 24.0
    text = render_plan(planned(place.file), found)
    assert "12 in all, 4 steps an epoch" in text


def test_predicted_disk_is_what_is_written(place: Place) -> None:
    place.write({"training": {"checkpoints": {"dtype": "fp32"}}})
    predicted = sum(figures(planned(place.file), None).disk.values())
    applied(place.file)
    store = place.folder / ".runner"
    written = sum(file.stat().st_size for file in store.rglob("*") if file.is_file() and "index" not in file.name)
    assert predicted == pytest.approx(written, rel=0.35), (
        "tiny files are mostly headers; benchmarks/memory.py has real sizes"
    )


def test_excluded_items_are_listed_with_reasons(place: Place) -> None:
    (place.folder / "pics" / "3.txt").unlink()
    plan = planned(place.file, 'dataset.on_bad_item="skip"')
    found = figures(plan, None)
    assert found.excluded == [("pics/3.png", "has no caption file (3.txt), and its source no class_tokens")]
    assert "pics/3.png" in render_plan(plan, found)


def test_planning_imports_no_torch(done: Place) -> None:
    code = (
        "import sys; sys.argv = ['runner', 'plan', 'run.toml', '--json']; from runner.cli.main import run; code = run();"
        "heavy = [name for name in ('torch', 'diffusers', 'transformers', 'numpy', 'peft') if name in sys.modules];"
        "print(heavy, file=sys.stderr); sys.exit(code or (9 if heavy else 0))"
    )
    for command in ("plan", "apply"):
        result = subprocess.run(
            [sys.executable, "-c", code.replace("'plan', 'run.toml', '--json'", f"'{command}', 'run.toml'")],
            cwd=done.folder,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        if command == "apply":
            assert "Nothing to do: everything is up to date." in result.stderr


# --- plan files, locks, exit codes ------------------------------------------------------------------------------------


def test_a_plan_file_is_applied_or_refused_when_stale(place: Place) -> None:
    place.run("plan", "--out", "plan.json", "--set", "training.learning_rate=2e-3", "--target", "train").ok()
    content = json.loads((place.folder / "plan.json").read_text())
    assert content["version"] == 1
    assert content["settings"] == ["training.learning_rate=2e-3"]
    (place.folder / "pics" / "0.txt").write_text("another caption")
    stale = place.run("apply", "plan.json")
    assert stale.code == 3
    assert "the plan is stale: cache.text: its inputs changed since it was made" in stale.err
    place.run("plan", "--out", "plan.json", "--set", "training.learning_rate=2e-3", "--target", "train").ok()
    place.run("apply", "plan.json").ok()
    assert (
        place.run("plan", "--detailed-exitcode", "--set", "training.learning_rate=2e-3", "--target", "train").code == 0
    )
    assert place.run("plan", "--detailed-exitcode", "--set", "training.learning_rate=2e-3").code == 2
    assert place.run("apply", "plan.json", "--set", "run.seed=1").code == 64
    for text, part in (("{", "is no plan"), ("[]", "is no plan"), ('{"version": 99}', "written by a newer runner")):
        (place.folder / "bad.json").write_text(text)
        bad = place.run("apply", "bad.json")
        assert bad.code == 3
        assert part in bad.err


def test_locked(done: Place) -> None:
    lock = done.folder / "run.lock"
    assert done.run("apply", "--locked").code == 0
    assert done.run("apply", "--locked", "--set", "run.seed=1").code == 64
    original = lock.read_text()
    (done.folder / "run.toml").write_text(
        done.file.read_text().replace("learning_rate = 0.001", "learning_rate = 0.002")
    )
    changed = done.run("apply", "--locked")
    assert changed.code == 4
    assert "things differ from run.lock:" in changed.err
    assert "inputs.configuration:" in changed.err
    done.run("apply", "--yes").ok()
    assert lock.read_text() != original
    lock.write_text(
        lock.read_text()
        .replace('"run.deterministic" = true', '"run.deterministic" = false')
        .replace('torch = "', 'torch = "9')
    )
    both = done.run("apply", "--locked")
    assert both.code == 4
    assert "bits.run.deterministic: False → True" in both.err
    assert "environment.torch: 9" in both.err
    lock.write_text(lock.read_text().replace("version = 1", "version = 2", 1))
    assert done.run("apply", "--locked").code == 3
    lock.unlink()
    absent = done.run("apply", "--locked")
    assert absent.code == 4
    assert "there is no run.lock" in absent.err


def test_another_device_is_refused_under_locked(done: Place) -> None:
    lock = done.folder / "run.lock"
    shutil.rmtree(done.folder / ".runner")
    shutil.rmtree(done.folder / "runs")
    text = lock.read_text()
    lock.write_text(text.replace('device = "cpu', 'device = "tpu'))
    result = done.run("apply", "--locked")
    assert result.code == 4
    assert "environment.device: tpu" in result.err
    lock.write_text(text)
    done.run("apply", "--locked").ok()
    assert lock.read_text() == text


def test_replacing_trained_work_needs_yes(done: Place) -> None:
    result = done.run("apply", "--set", "training.learning_rate=2e-3")
    assert result.code == 64
    assert result.err.endswith(
        "error: this would train anew, and 6 trained steps of run 't' give way in the run's folder\n"
        "hint: say --yes to do it without asking; they stay in the store until `runner gc --delete`\n\n"
    )
    assert done.run("plan", "--detailed-exitcode").code == 0, "nothing was touched"
    done.run("apply", "--yes", "--set", "training.learning_rate=2e-3").ok()
    assert "training.learning_rate" in (done.folder / "run.lock").read_text()


def test_targets_stop_after_their_stage(place: Place) -> None:
    said = place.run("apply", "--target", "cache").ok().err
    assert re.search(r"^time: cache\.latents \d+ s, cache\.text \d+ s$", said, re.MULTILINE)
    assert actions(planned(place.file)) == {**dict.fromkeys(NOTHING, "+"), "cache.latents": "=", "cache.text": "="}
    said = place.run("apply", "--target", "train").ok().err
    assert re.search(r"^time: train \d+ s$", said, re.MULTILINE), "of what there was to do"
    assert actions(planned(place.file))["train"] == "="
    place.run("apply", "--target", "select").ok()
    plan = planned(place.file)
    assert (actions(plan)["select"], actions(plan)["publish"]) == ("=", "~")
    assert not (place.output / "best.safetensors").exists()


def test_two_runs_share_a_store(place: Place) -> None:
    applied(place.file, until="cache")
    (place.folder / "sub").mkdir()
    other = place.folder / "sub" / "other.toml"
    other.write_text(
        place.file.read_text().replace('"model"', '"../model"').replace('"pics"', '"../pics"').replace('"t"', '"u"')
    )
    plan = planned(other, "training.learning_rate=1e-4")
    assert actions(plan)["cache.latents"] == "="
    assert actions(plan)["train"] == "+"


def test_gc_keeps_what_runs_need(done: Place) -> None:
    done.run("gc").ok()
    assert "nothing to delete" in done.run("gc").err
    done.run("apply", "--yes", "--set", "dataset.resolution=16").ok()
    before = {path for path in (done.folder / ".runner").rglob("*") if path.is_file()}
    dry = done.run("gc").ok()
    assert "could be deleted: runner gc --delete" in dry.err
    assert {path for path in (done.folder / ".runner").rglob("*") if path.is_file()} == before
    done.run("gc", "--delete").ok()
    assert actions(planned(done.file, "dataset.resolution=16")) == NOTHING
    assert actions(planned(done.file))["train"] == "-/+", "the earlier training is gone"


def test_diff_shows_what_two_files_do_differently(done: Place) -> None:
    other = done.folder / "other.toml"
    other.write_text(done.file.read_text().replace("learning_rate = 0.001", "learning_rate = 0.5") + "\n# a comment\n")
    text = done.run("diff", "run.toml", "other.toml").ok().out
    assert "training.learning_rate" in text
    assert "0.001" in text
    assert "0.5" in text
    assert "run.seed" not in text


def prepared_errors(place: Place, **changes: Any) -> str:
    from runner.errors import InvalidConfig

    place.write(changes)
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.file)
    return "\n".join(diagnostic.render() for diagnostic in caught.value.diagnostics)


def test_an_output_folder_that_cannot_be_written(place: Place) -> None:
    (place.folder / "file").write_text("")
    assert "output_dir" in prepared_errors(place, run={"name": "t", "output_dir": "file/below"})
