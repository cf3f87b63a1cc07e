"""Predicted against measured peak memory and disk, each phase as a process of its own.

    python -m benchmarks.memory [--only NAME …] [--json FILE] [--models FOLDER]

Measured: the process's peak resident memory less what the same imports take alone; on a GPU what PyTorch reserved there.
The full-size models have random weights (SD3 without T5) and are written on the first use.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import click
import tomlkit

from benchmarks.measure import GB, libraries_bytes, report, runner
from tests.full_size import write_full, write_sd15
from tests.support import draw_pictures, merged, without_none

BASE: dict[str, Any] = {
    "schema_version": 1,
    "run": {"name": "m"},
    "model": {"family": "sd15"},
    "dataset": {"sources": [{"path": "images"}]},
    "training": {"max_train_steps": 2, "checkpoints": {"every_n_steps": 2}, "logging": {"tensorboard": False}},
    "sampling": {"num_inference_steps": 2, "prompts": [{"prompt": "a red circle on white"}]},
}
LORA: dict[str, Any] = {"network": {"rank": 16}}


def size(resolution: int, batch: int) -> dict[str, Any]:
    return {
        "dataset": {"resolution": resolution, "batch_size": batch},
        "sampling": {"width": resolution, "height": resolution},
    }


MICRO = {"model": {"checkpoint": "builtin:micro", "dtype": "fp32"}}
FP32 = {"model": {"dtype": "fp32"}}
BF16 = {"model": {"dtype": "bf16"}}
SDXL = {"model": {"family": "sdxl"}}
SD3 = {"model": {"family": "sd3"}}
CHECKPOINTING = {"training": {"memory": {"gradient_checkpointing": True}}}
LEAN: dict[str, Any] = {
    "training": {
        "clip_grad": "per_tensor",
        "memory": {"fused_backward": True},
        "optimizer": {"type": "adamw8bit", "stochastic_rounding": True},
    },
    "selection": {"strategy": "last", "metrics": []},
}
"""A full fine-tune in the least memory."""
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "micro LoRA, batch 16": [MICRO, LORA, size(32, 16)],
    "micro full, batch 32": [MICRO, size(32, 32)],
    "sd15 LoRA fp32, 256², batch 1": [FP32, LORA, size(256, 1)],
    "sd15 LoRA fp32, 256², batch 4": [FP32, LORA, size(256, 4)],
    "sd15 LoRA fp32, 512², batch 1": [FP32, LORA, size(512, 1)],
    "sd15 LoRA fp32, 512², checkpointing": [
        FP32,
        LORA,
        size(512, 1),
        {"training": {"memory": {"gradient_checkpointing": True}}},
    ],
    "sd15 LoRA bf16, 256², batch 2": [LORA, {"model": {"dtype": "bf16"}}, size(256, 2)],
    "sd15 LoRA with text encoder, 256²": [
        FP32,
        LORA,
        size(256, 1),
        {"training": {"components": {"text_encoder_1": True}}},
    ],
    "sd15 full fp32, 256², batch 1": [FP32, size(256, 1)],
    "sd15 full fp32, adamw8bit, 256²": [FP32, size(256, 1), {"training": {"optimizer": {"type": "adamw8bit"}}}],
    "sdxl LoRA bf16, 256², checkpointing": [SDXL, LORA, BF16, CHECKPOINTING, size(256, 1)],
    "sdxl LoRA on fp8, 256², checkpointing": [
        SDXL,
        LORA,
        BF16,
        CHECKPOINTING,
        {"model": {"quantization": "fp8_scaled"}},
        size(256, 1),
    ],
    "sd3 LoRA bf16, 256², checkpointing": [SD3, LORA, BF16, CHECKPOINTING, size(256, 1)],
    "sd3 full bf16 rounded, adamw8bit, fused, 256²": [SD3, BF16, CHECKPOINTING, LEAN, size(256, 1)],
}
"""Name → changes of `BASE`."""
PHASES = ("cache.latents", "cache.text", "train", "sample", "select", "publish")


def model_of(family: str, folder: Path) -> Path:
    """The random checkpoint of a family."""
    file = folder / f"{family}-random.safetensors"
    if not file.is_file():
        write_sd15(file) if family == "sd15" else write_full(file, family, ("t5xxl",) if family == "sd3" else ())
    return file.resolve()


def device_peak(folder: Path, phase: str) -> int:
    """What PyTorch reserved on the GPU in a stage; 0 where there is none."""
    log = folder / "runs" / "m" / "logs" / "events.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    found = [event["device_bytes"] for event in events if event["type"] == "memory" and event["stage"] == phase]
    return max(found, default=0)


def measure(
    name: str, models: Path, folder: Path, phases: tuple[str, ...]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(a row for each phase, the setting's row)."""
    config = BASE
    for change in SETTINGS[name]:
        config = merged(config, change)
    if "checkpoint" not in config["model"]:
        config["model"]["checkpoint"] = str(model_of(config["model"]["family"], models))
    resolution = config["dataset"]["resolution"]
    draw_pictures(folder / "images", max(6, config["dataset"]["batch_size"]), size=resolution)
    (folder / "run.toml").write_text(tomlkit.dumps(without_none(config)), encoding="utf-8")
    plan = json.loads(runner(folder, "plan", "run.toml", "--json").out)
    figures = plan["figures"]
    base = libraries_bytes(folder)
    rows = []
    for phase in phases:
        peak = runner(folder, "apply", "run.toml", "--target", phase).peak - base
        peak = device_peak(folder, phase) or peak
        predicted = figures["predicted_memory_bytes"].get(phase, 0)
        rows.append(
            {
                "phase": f"{name}: {phase}",
                "predicted_gb": predicted / GB,
                "measured_gb": peak / GB,
                "ratio": predicted / peak,
            }
        )
        click.echo(f"{name}: {phase}: {predicted / GB:.2f} predicted, {peak / GB:.2f} measured", err=True)
    peak = max(row["measured_gb"] for row in rows)
    if phases != PHASES:
        return rows, {"setting": name, "phases": ", ".join(phases), "measured_gb": peak}
    runner(folder, "apply", "run.toml")
    disk = sum(
        file.stat().st_size for file in (folder / ".runner").rglob("*") if file.is_file() and "index" not in file.name
    )
    predicted = max(figures["predicted_memory_bytes"].values()) / GB
    setting = {
        "setting": name,
        "predicted_gb": predicted,
        "measured_gb": peak,
        "ratio": predicted / peak,
        "predicted_disk_gb": sum(figures["predicted_disk_bytes"].values()) / GB,
        "measured_disk_gb": disk / GB,
        "disk_ratio": sum(figures["predicted_disk_bytes"].values()) / disk,
    }
    return rows, setting


@click.command(help=__doc__)
@click.option("--only", multiple=True, help="Part of a setting's name.")
@click.option(
    "--phase", "phases", multiple=True, type=click.Choice(PHASES), default=PHASES, help="Only these; all else."
)
@click.option("--json", "out", type=click.Path(path_type=Path))
@click.option("--models", type=click.Path(path_type=Path), default=Path(tempfile.gettempdir()))
def main(only: tuple[str, ...], phases: tuple[str, ...], out: Path | None, models: Path) -> None:
    names = [name for name in SETTINGS if not only or any(part in name for part in only)]
    found: list[dict[str, Any]] = []
    settings: list[dict[str, Any]] = []
    for name in names:
        folder = Path(tempfile.mkdtemp(prefix="runner-memory-"))
        try:
            rows, setting = measure(name, models, folder, phases)
        finally:
            shutil.rmtree(folder)
        found += rows
        settings.append(setting)
        click.echo(f"{name}: {setting['measured_gb']:.2f} GB", err=True)
    report("Peak memory by phase, above the libraries", found, None)
    report("Peak memory above the libraries, and disk", settings, out)


if __name__ == "__main__":
    main()
