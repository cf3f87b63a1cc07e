"""What only a GPU can show; skipped where there is none."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests.inprocess import applied, stopped_anew, trained_bytes
from tests.support import Place

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_two_trainings_on_a_gpu_are_equal_to_the_byte(place: Place, dtype: str) -> None:
    place.write({"model": {"dtype": dtype}, "run": {"device": "cuda"}})
    first = trained_bytes(place.file)
    shutil.rmtree(place.folder / ".runner")
    assert trained_bytes(place.file) == first


def test_a_stopped_training_on_a_gpu_goes_on_where_it_was(place: Place) -> None:
    place.write({"model": {"dtype": "bf16"}, "run": {"device": "cuda"}, "training": {"optimizer": {"type": "adamw8bit"}}})  # fmt: skip
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
