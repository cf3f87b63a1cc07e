"""The loop's settings do what they say: precision, accumulation, averages, kept checkpoints, events, failures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from runner.errors import RunFailed
from runner.inputs.train import TrainInputs
from tests.inprocess import applied, prepared, trained_bytes
from tests.support import Place, draw_pictures


def events(place: Place, kind: str = "step") -> list[dict[str, Any]]:
    lines = (place.output / "logs" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["type"] == kind]


def losses(place: Place, **changes: Any) -> list[float]:
    place.write(changes)
    applied(place.file, until="train")
    return [event["loss"] for event in events(place)]


@pytest.mark.parametrize(
    "settings",
    [
        {"model": {"dtype": "bf16"}},
        {"training": {"mixed_precision": "bf16"}},
        {"model": {"dtype": "fp16"}, "training": {"mixed_precision": "fp16"}},
    ],
)
def test_lower_precision_trains_close_to_fp32(place: Place, settings: dict[str, Any]) -> None:
    reference = losses(place)
    ours = losses(place, **settings)[-len(reference) :]
    assert ours != reference
    assert ours == pytest.approx(reference, rel=0.05)
    assert prepared(place.file).config.training.mixed_precision in ("bf16", "fp16")


def test_the_tail_of_an_epoch_is_a_step_and_any_step_can_be_made_alone(place: Place) -> None:
    """That accumulated steps are the mean over their items is tested in test_switches.py."""
    place.write(
        {
            "dataset": {"batch_size": 1, "held_out": {"count": 3}},
            "training": {"gradient_accumulation_steps": 2, "max_train_steps": 8},
        }
    )
    run = prepared(place.file)
    assert run.length.batches_per_epoch == 7
    assert run.length.steps_per_epoch == 4
    applied(place.file, until="train")
    from runner.plan.compile import compile_graph
    from runner.stages.loader import Sources, StepLoader

    inputs = compile_graph(run).of(TrainInputs)
    loader = StepLoader(
        inputs,
        Sources(
            latents=None,
            latent_key=lambda d, v: "",
            latent_shape=lambda s: (4, 16, 16),
            texts=None,
            text_key=lambda t: "",
            learned=lambda item, view, row: {},
        ),
        0,
    )
    steps = [step for step, _ in zip(loader.steps_from(0), range(8), strict=False)]
    assert [len(step) for step in steps] == [2, 2, 2, 1] * 2
    assert all(sum(batch.share for batch in step) == pytest.approx(1) for step in steps)
    assert sorted(name for step in steps[:4] for batch in step for name in batch.names) == sorted(
        item.name for item in run.collection.items
    )
    again = next(loader.steps_from(5))
    assert all(torch.equal(a.tensors["noise"], b.tensors["noise"]) for a, b in zip(again, steps[5], strict=True))


def test_an_average_is_kept_beside_the_weights(place: Place) -> None:
    place.write({"training": {"ema": {"decay": 0.5, "update_every": 2}}})
    outcome = applied(place.file)
    run = prepared(place.file)
    folder = run.store.artifact("train", outcome.graph.fingerprint("train")) / "checkpoints"
    last = sorted(folder.iterdir())[-1]
    raw, ema = (load_file(last / f"{name}.safetensors") for name in ("raw", "ema"))
    assert set(raw) == set(ema)
    assert any(not torch.equal(raw[name], ema[name]) for name in raw)
    assert {row["weights"] for row in outcome.selection["candidates"]} == {"raw", "ema"}
    assert (place.output / "checkpoints" / "step-00000006-ema.safetensors").exists()
    assert (place.output / "samples" / "step-00000006-ema-prompt-01.png").exists()


def test_keep_spares_the_newest_and_the_best(place: Place) -> None:
    place.write(
        {"training": {"max_train_steps": 10, "learning_rate": 0.05, "checkpoints": {"every_n_steps": 2, "keep": 2}}}
    )
    outcome = applied(place.file)
    kept = [row["step"] for row in outcome.selection["candidates"]]
    assert {8, 10} <= set(kept)
    assert len(kept) <= 3
    assert sorted(path.name for path in (place.output / "checkpoints").iterdir()) == [
        f"step-{step:08d}.safetensors" for step in kept
    ]
    place.write(
        {
            "training": {"max_train_steps": 10, "learning_rate": 0.05, "checkpoints": {"every_n_steps": 2}},
            "run": {"name": "all"},
        }
    )
    everything = applied(place.file)
    best = min(everything.selection["candidates"], key=lambda row: row["stable_loss"])["step"]
    assert best in kept


def test_checkpointing_and_eager_attention_change_bits_at_most(place: Place) -> None:
    reference = losses(place)
    for changes in ({"training": {"memory": {"gradient_checkpointing": True}}}, {"model": {"attention": "eager"}}):
        found = losses(place, **changes)[-len(reference) :]
        assert found == pytest.approx(reference, rel=1e-4)


def compiled(place: Place) -> tuple[list[float], list[float]]:
    """Losses without and with the blocks compiled."""
    from torch._dynamo.utils import counters

    counters.clear()
    reference = losses(place, training={"max_train_steps": 2})
    assert not counters["stats"], "nothing was compiled"
    shutil.rmtree(place.folder / ".runner" / "artifacts")
    found = losses(place, training={"max_train_steps": 2, "compile": True})[-2:]
    assert counters["stats"]["unique_graphs"] >= 2, "graphs of the denoiser's blocks"
    assert {event["text"] for event in events(place, "note")} == {
        "compiling the denoiser's blocks for latents of 2x4x16x16: this step is slow"
    }
    return reference, found


def test_a_denoisers_blocks_become_graphs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """That PyTorch runs as they are: making machine code of them takes minutes."""
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, *_, **__: graph)
    reference, found = compiled(place)
    assert found == pytest.approx(reference, rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a compiler on the CPU")
def test_a_compiled_denoiser_has_the_same_losses(place: Place) -> None:
    reference, found = compiled(place)
    assert found == pytest.approx(reference, rel=1e-3)


def test_components_have_rates_of_their_own(place: Place) -> None:
    place.write({"training": {"components": {"denoiser": 1e-3, "text_encoder_1": 5e-4}}})
    applied(place.file, until="train")
    assert events(place)[-1]["lr/denoiser"] == 1e-3
    assert events(place)[-1]["lr/text_encoder_1"] == 5e-4


def test_a_loss_that_is_not_finite_stops_with_step_items_and_last_checkpoint(place: Place) -> None:
    place.write(
        {
            "training": {
                "max_train_steps": 40,
                "learning_rate": 1000.0,
                "max_grad_norm": 0,
                "checkpoints": {"every_n_steps": 1},
                "optimizer": {"weight_decay": 0},
            },
            "network": None,
        }
    )
    with pytest.raises(RunFailed) as caught:
        applied(place.file, until="train")
    text = str(caught.value)
    assert text.startswith("the loss is not finite at step ")
    assert "items of its batch: " in text
    assert ".png" in text
    assert "last good checkpoint: " in text
    result = place.run("apply")
    assert result.code == 1
    assert "Traceback" not in result.err


def test_events_and_tensorboard(place: Place) -> None:
    place.write({"training": {"logging": {"tensorboard": True}}, "sampling": {"every_n_steps": 3, "at_first": True}})
    result = place.run("apply").ok()
    lines = (place.output / "logs" / "events.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert all({"v", "time", "attempt", "seq", "stage", "step", "type"} <= set(event) for event in found)
    assert [event["seq"] for event in found] == list(range(1, len(found) + 1))
    assert {"started", "progress", "step", "sample", "checkpoint", "finished"} <= {event["type"] for event in found}
    assert [event["step"] for event in found if event["type"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert {event["step"] for event in found if event["type"] == "sample" and event["stage"] == "train"} == {0, 3, 6}
    assert list((place.output / "logs" / "tensorboard").glob("events.out.tfevents.*"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(place.output / "logs" / "tensorboard"))
    board.Reload()
    assert [scalar.step for scalar in board.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert "train 6/6" in result.err, "plain lines where there is no terminal"
    assert "\x1b" not in result.err


def test_regularization_weight_and_prior(place: Place) -> None:
    draw_pictures(place.folder / "reg", 3, seed=8)
    base = {"dataset": {"sources": [{"path": "pics"}, {"path": "reg", "regularization": True}]}}
    first = losses(place, **base)
    second = losses(place, **base, training={"loss": {"prior_loss_weight": 0.1}})[-len(first) :]
    assert first != second
    run = prepared(place.file)
    assert sum(item.repeats for item in run.collection.items if item.settings.regularization) == 8


def test_training_whole_in_from_scratch_needs_no_weights(place: Place) -> None:
    (place.folder / "model" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    place.write({"network": None, "model": {"from_scratch": True}})
    first = trained_bytes(place.file)
    other = trained_bytes(place.file, "run.seed=7")
    assert first != other


def test_samples_in_training_are_those_of_runner_sample(finished: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for checkpoint, step in (("4", 4), ("base", 0), ("last", 6)):
        finished.run("sample", "--checkpoint", checkpoint, "--out", str(out / checkpoint)).ok()
        made = next((out / checkpoint).iterdir())
        shown = finished.output / "samples" / f"step-{step:08d}-prompt-01.png"
        assert made.read_bytes() == shown.read_bytes()
