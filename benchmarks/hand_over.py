"""Writes what benchmarks/bare_loop.py needs to train exactly what a run trains: its batches, its start, its settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from runner.config.load import load
from runner.core.events import Events
from runner.execute.apply import Apply
from runner.inputs.train import TrainInputs
from runner.networks.attach import Dropouts, attach
from runner.optim.build import optimizer_arguments
from runner.plan.prepare import prepare
from runner.stages.loader import StepLoader
from runner.stages.stop import StopFlag
from runner.stages.train import TrainStage
from runner.store.store import find_store
from runner.weights.tensors import write_tensors


def hand_over(file: Path, folder: Path, steps: int) -> None:
    """`file` is a run.toml whose caches are filled and whose model is a diffusers directory."""
    run = prepare(load(file), find_store(file.parent), may_defer=False)
    apply = Apply(run, Events(folder / "events.jsonl"), StopFlag(), "train", "")
    inputs = apply.graph.of(TrainInputs)
    encoders = (inputs.latent_encoder, inputs.text_encoder)
    stage = TrainStage(apply.context, inputs, encoders, "0" * 64, lambda _: None, lambda: None)  # type: ignore[arg-type, return-value]
    loader = StepLoader(inputs, stage._sources()[0], 0)
    tensors: dict[str, torch.Tensor] = {}
    for step, batches in zip(range(steps), loader.steps_from(0), strict=False):
        assert len(batches) == 1, "without accumulation"
        for name, tensor in batches[0].tensors.items():
            if name != "weights":
                own = tensor.float() if name.startswith("cond.") else tensor
                tensors[f"{step}.{name.removeprefix('cond.')}"] = own
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "batches.safetensors", tensors)
    targets = inputs.targets or ()
    if targets:
        denoiser = apply.context.load("denoiser")
        start = attach({"denoiser": denoiser}, targets, Dropouts(), -1, inputs.seed)
        write_tensors(folder / "start.safetensors", {_peft_name(name): value for name, value in start.items()})
    unet = run.model.components["denoiser"].weights[0].parent
    settings: dict[str, Any] = {
        "unet": str(unet),
        "class": run.model.components["denoiser"].config["_class_name"],
        "compile": run.config.training.compile,
        "layers": [target.name for target in targets],
        "rank": targets[0].rank if targets else 0,
        "alpha": targets[0].alpha if targets else 0,
        "steps": steps,
        "threads": apply.graph.runtime.threads or torch.get_num_threads(),
        "bf16": inputs.numerics.mixed_precision == "bf16",
        "scheduler": {
            **{k: v for k, v in run.model.scheduler.items() if k.startswith(("beta", "num_train"))},
            "prediction_type": inputs.numerics.prediction_type,
        },
        "optimizer": {
            "lr": inputs.learning_rate,
            **{k: v for k, v in optimizer_arguments(inputs.optimizer, torch.optim.AdamW).items() if k != "fused"},
        },
    }
    (folder / "settings.json").write_text(json.dumps(settings, indent=2))


def _peft_name(name: str) -> str:
    """`denoiser.layer.lora_A` → `layer.lora_A.default.weight`."""
    return f"{name.removeprefix('denoiser.')}.default.weight"
