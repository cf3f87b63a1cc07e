"""What only a GPU can show; skipped where there is none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from runner.stages.loader import StepLoader
from tests.inprocess import applied, stopped_anew, trained_bytes
from tests.ready import ready
from tests.support import Place

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_two_trainings_on_a_gpu_are_equal_to_the_byte(place: Place, dtype: str) -> None:
    place.write({"model": {"dtype": dtype}, "run": {"device": "cuda"}})
    first = trained_bytes(place.file)
    shutil.rmtree(place.folder / ".runner")
    assert trained_bytes(place.file) == first


def test_a_stopped_training_on_a_gpu_goes_on_where_it_was(place: Place) -> None:
    place.write(
        {"model": {"dtype": "bf16"}, "run": {"device": "cuda"}, "training": {"optimizer": {"type": "adamw8bit"}}}
    )
    calm = trained_bytes(place.file)
    stopped_anew(place, 3)
    assert trained_bytes(place.file) == calm


def test_losses_on_a_gpu_are_those_of_the_cpu(place: Place) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        place.write({"run": {"device": device, "name": device}})
        applied(place.file, until="train")
        lines = (place.folder / "runs" / device / "logs" / "events.jsonl").read_text().splitlines()
        found[device] = [event["loss"] for event in map(json.loads, lines) if event["type"] == "step"]
        shutil.rmtree(place.folder / ".runner")
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-3)


def test_a_compiled_training_on_a_gpu(place: Place) -> None:
    place.write({"run": {"device": "cuda"}, "model": {"dtype": "bf16"}, "training": {"compile": True}})
    assert trained_bytes(place.file)


@pytest.mark.parametrize(
    "memory", [{"blocks_to_swap": 2}, {"activation_offload": True, "gradient_checkpointing": True}]
)
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_memory_settings_on_a_gpu_train_the_same(
    family_place: Callable[..., Place], name: str, memory: dict[str, Any]
) -> None:
    found = []
    for settings in ({}, memory):
        place = family_place(f"{name}", run={"device": "cuda"}, training={"memory": settings})
        applied(place.file, until="train")
        lines = (place.output / "logs" / "events.jsonl").read_text().splitlines()
        found.append([event["loss"] for event in map(json.loads, lines) if event["type"] == "step"])
        place.folder.rename(place.folder.with_name(f"done_{len(found)}"))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("kind", ["fp8", "fp8_scaled", "int8", "nf4"])
def test_packed_weights_on_a_gpu(family_place: Callable[..., Place], kind: str) -> None:
    place = family_place(
        "sd3", run={"device": "cuda"}, model={"dtype": "bf16", "quantization": kind, "text_encoder_quantization": kind}
    )
    assert trained_bytes(place.file)


@pytest.mark.parametrize("kind", ["adamw8bit", "paged_adamw8bit", "lion8bit", "muon"])
def test_lean_full_fine_tunes_on_a_gpu(family_place: Callable[..., Place], kind: str) -> None:
    memory = {"fused_backward": True, "optimizer_offload": kind == "muon", "gradient_checkpointing": True}
    training = {"clip_grad": "per_tensor", "memory": memory, "optimizer": {"type": kind, "stochastic_rounding": True}}
    place = family_place(
        "sd3",
        run={"device": "cuda"},
        model={"dtype": "bf16"},
        network=None,
        training=training,
        selection={"publish": []},
    )
    assert trained_bytes(place.file)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "hunyuan_video", "framepack", "flux1", "chroma"])
def test_no_step_waits_for_a_gpu(family_place: Callable[..., Place], name: str) -> None:
    """After the first step, which warms up, PyTorch raises at whatever makes the host wait for the device."""
    place = family_place(name)
    place.write({"run": {"device": "cuda"}})
    task, loader = ready(place, torch.device("cuda")).task()
    steps = [next(loader.steps_from(step)) for step in range(3)]
    for number, batches in enumerate(steps):
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            for batch in batches:
                task.loss(batch).backward()
            torch.nn.utils.clip_grad_norm_(list(task.parameters.values()), 1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_batches_that_are_copied_ahead_are_the_same(place: Place) -> None:
    run, device = ready(place, torch.device("cuda")), torch.device("cuda")
    plain = StepLoader(run.graph.train, run.sources, 0).steps_from(0)
    ahead = StepLoader(run.graph.train, run.sources, 2, device=device).steps_from(0)
    for number in range(8):
        for own, other in zip(next(ahead), next(plain), strict=True):
            assert (own.copied is not None) == (number > 0)
            assert own.names == other.names
            moved = own.to(device).tensors
            assert moved["latents"].device.type == "cuda"
            assert all(torch.equal(moved[name].cpu(), tensor) for name, tensor in other.tensors.items())
