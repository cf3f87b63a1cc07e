"""A run that was killed or stopped anywhere and applied again comes to the same bytes; states that are damaged are skipped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.config.optimizer_kinds import OPTIMIZERS
from tests.inprocess import prepared, stopped_anew, trained_bytes
from tests.kill_and_resume import FEW, PLACES, SETTINGS, compare
from tests.support import ROOT, Place, new_place, run_bytes


def test_kills_change_no_byte(tmp_path: Path, tiny_model: Path) -> None:
    """A kill in each stage, in a state's save and in publishing; `python -m tests.kill_and_resume` does twenty."""
    assert compare(tmp_path, tiny_model, FEW) == len(FEW)


@pytest.mark.slow
def test_twenty_kills_change_no_byte(tmp_path: Path, tiny_model: Path) -> None:
    assert compare(tmp_path, tiny_model, PLACES) >= 20


def last_events(place: Place) -> list[dict[str, object]]:
    lines = (place.output / "logs" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_stopped_training_goes_on_where_it_was(place: Place, optimizer: str, precision: str) -> None:
    """Network dropout, captions dropped, accumulation, an average and a schedule: the state holds all that matters."""
    changes = {
        **SETTINGS,
        "training": {
            **SETTINGS["training"],
            "optimizer": {"type": optimizer, "args": {"min_8bit_size": 16} if "8bit" in optimizer else {}},
            "mixed_precision": precision,
        },  # type: ignore[dict-item]
    }
    place.write(changes)
    calm = trained_bytes(place.file)
    stopped_anew(place, 5)
    assert trained_bytes(place.file) == calm


@pytest.mark.parametrize("kind", [kind for kind in OPTIMIZERS if kind not in ("adamw", "adamw8bit")])
def test_every_optimizer_goes_on_where_it_was(place: Place, kind: str) -> None:
    args = {"min_8bit_size": 16} if "min_8bit_size" in OPTIMIZERS[kind].args else {}
    training = {**SETTINGS["training"], "optimizer": {"type": kind, "args": args}}  # type: ignore[dict-item]
    if kind == "prodigy":
        training["learning_rate"] = 1.0
    if kind.startswith("schedule_free"):  # it averages in place of a schedule
        training["scheduler"] = None
    place.write({**SETTINGS, "training": training})
    calm = trained_bytes(place.file)
    stopped_anew(place, 5)
    assert trained_bytes(place.file) == calm


@pytest.mark.parametrize("memory", [{"fused_backward": True}, {"optimizer_offload": True}, {}])
@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "muon"])
def test_tensor_by_tensor_goes_on_where_it_was(place: Place, kind: str, memory: dict[str, bool]) -> None:
    """A full fine-tune of bf16 weights with stochastic rounding."""
    args = {"min_8bit_size": 16} if kind == "adamw8bit" else {}
    optimizer = {"type": kind, "args": args, "stochastic_rounding": True}
    training = {
        "max_grad_norm": 0.5,
        "clip_grad": "per_tensor",
        "memory": memory,
        "optimizer": optimizer,
        "max_train_steps": 8,
        "ema": {},
    }
    place.write({"network": None, "model": {"dtype": "bf16"}, "training": training, "selection": {"publish": []}})
    calm = trained_bytes(place.file)
    stopped_anew(place, 5)
    assert trained_bytes(place.file) == calm


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        pytest.param(
            name,
            whole,
            id=f"{name}-{'full' if whole else 'lora'}",
            marks=[pytest.mark.slow] * ((name, whole) != ("sd3", False)),
        )
        for name in ("sdxl", "sd3", "flux1")
        for whole in (False, True)
    ],
)
def test_kills_of_each_family_change_no_byte(family_place: Callable[..., Place], name: str, whole: bool) -> None:
    """Applied through the command line, killed in training and in publishing, and applied again."""
    encoders = {"text_encoder_1": True} if whole else {"text_encoder_1": True, "text_encoder_2": 1e-4}
    changes = {
        "network": None if whole else {"rank": 2, "dropout": 0.1},
        "dataset": {"flip_aug": True, "caption_dropout_rate": 0.2},
        "training": {"components": encoders, "checkpoints": {"every_n_steps": 3, "state_every_n_steps": 2}},
        "selection": {"publish": [{"directory": "published", "mode": "copy", "format": "diffusers"}]},
    }
    calm = family_place(name, **changes)
    calm.run("apply").ok()
    expected = run_bytes(calm.output)
    shutil.rmtree(calm.folder / ".runner")
    shutil.rmtree(calm.output)
    shutil.rmtree(calm.folder / "published")
    kills = (
        ("rename:items/samples:2:before",)
        if whole
        else ("rename:states/state-00000004:1:after", "rename:exports/:1:before")
    )
    for kill in kills:
        assert calm.run("apply", kill=kill).code == -9, kill
    calm.run("apply").ok()
    assert run_bytes(calm.output) == expected


def test_a_cold_cache_gives_the_weights_of_a_warm_one(place: Place) -> None:
    """Also where encodings are held in memory or made at each use, and with other workers and batches of encoding."""
    place.write({"caching": {"latent_draw": "sample"}})
    first = trained_bytes(place.file)
    shutil.rmtree(place.folder / ".runner" / "artifacts")
    assert trained_bytes(place.file) == first
    for setting in ('caching.latents="memory"', 'caching.text="memory"', "dataset.workers=0", "dataset.workers=3"):
        shutil.rmtree(place.folder / ".runner")
        assert trained_bytes(place.file, setting) == first, setting


def test_a_damaged_state_is_named_and_the_one_before_it_used(place: Place) -> None:
    place.write(SETTINGS)
    calm = trained_bytes(place.file)
    stopped_anew(place, 6)
    run = prepared(place.file)
    states = sorted(next(iter(run.store.workspaces("train"))).glob("states/state-*"))
    assert [state.name for state in states] == ["state-00000006", "state-00000007"]
    damaged = states[-1] / "weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-3] + b"abc")
    assert trained_bytes(place.file) == calm
    texts = [str(event.get("text")) for event in last_events(place) if event["type"] == "warning"]
    assert "state state-00000007 is damaged and skipped: weights.safetensors is not what was written" in texts


def test_a_damaged_item_is_encoded_again(place: Place) -> None:
    first = trained_bytes(place.file)
    run = prepared(place.file)
    shutil.rmtree(run.store.root / "artifacts")
    for kind in ("latents", "text"):
        items = sorted((run.store.root / "items" / kind).rglob("*.safetensors"))
        items[0].write_bytes(items[0].read_bytes()[:-1] + b"\x00")
        items[-1].unlink()
    assert trained_bytes(place.file) == first
    assert sum("is encoded again" in str(event.get("text")) for event in last_events(place)) >= 2


@pytest.mark.parametrize(("number", "code", "word"), [(signal.SIGTERM, 75, "stopped"), (signal.SIGINT, 130, "stopped")])
def test_signals_save_and_leave(tmp_path: Path, tiny_model: Path, number: int, code: int, word: str) -> None:
    place = new_place(tmp_path / "place", tiny_model)
    place.write(
        {"training": {"max_train_steps": 100, "checkpoints": {"every_n_steps": 50}}, "sampling": {"prompts": []}}
    )
    calm = new_place(tmp_path / "calm", tiny_model)
    calm.file.write_text(place.file.read_text())
    calm.run("apply").ok()
    environment = {**os.environ, "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-m", "runner", "apply"],
        cwd=place.folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = place.output / "logs" / "events.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and '"type": "step"' in log.read_text()):
        time.sleep(0.05)
    child.send_signal(number)
    _, err = child.communicate(timeout=120)
    assert child.returncode == code, err
    assert "the state is saved, apply again to go on" in err
    assert "Traceback" not in err
    status = place.run("status").ok().out
    assert word in status
    place.run("apply").ok()
    assert run_bytes(place.output) == run_bytes(calm.output)


def test_a_second_apply_is_refused_and_names_the_holder(place: Place) -> None:
    place.write({"training": {"max_train_steps": 100000, "checkpoints": {"every_n_steps": 100000}}})
    child = subprocess.Popen(
        [sys.executable, "-m", "runner", "apply"],
        cwd=place.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        log = place.output / "logs" / "events.jsonl"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (log.exists() and '"type": "step"' in log.read_text()):
            time.sleep(0.05)
        second = place.run("apply")
        assert second.code == 5
        assert f"error: run 't' is held by process {child.pid} on " in second.err
        assert "hint: wait for it, or stop that process" in second.err
    finally:
        child.kill()
        child.wait()
    done = place.run("apply", "--target", "cache")
    assert done.code == 0, "after SIGKILL nothing has to be cleaned"


def test_a_run_in_progress_survives_a_change_of_what_does_not_matter(place: Place) -> None:
    """Stopped, then logging, workers and names change: it goes on, and comes to the same bytes."""
    place.write(SETTINGS)
    calm = trained_bytes(place.file)
    stopped_anew(place, 5)
    changed = [
        "training.logging.every_n_steps=3",
        "dataset.workers=1",
        "training.logging.tensorboard=true",
        "run.name=other",
    ]
    assert trained_bytes(place.file, *changed) == calm
    log = place.folder / "runs" / "other" / "logs" / "events.jsonl"
    assert any(json.loads(line)["type"] == "resumed" for line in log.read_text().splitlines())
