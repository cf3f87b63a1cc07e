"""Training step, peak memory, cache stage and first step against a bare PyTorch loop (benchmarks/bare_loop.py).

    python -m benchmarks.step [--only NAME …] [--rounds 3] [--json FILE]

Both train the same model on the same batches and must have the same losses. They take turns, each in a process of its
own. "first step" is the time from the process's start to the end of its first step, with warm caches. On a machine
with a GPU the settings of SD 1.5 at 512² run too.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import click
import tomlkit

from benchmarks.measure import GB, ROOT, report, run, runner
from tests.support import draw_pictures, merged, without_none

BASE: dict[str, Any] = {
    "schema_version": 1,
    "run": {"name": "s"},
    "model": {"family": "sd15", "dtype": "fp32"},
    "network": {"rank": 16},
    "dataset": {"sources": [{"path": "images"}]},
    "training": {"learning_rate": 1e-4, "checkpoints": {}, "logging": {"every_n_steps": 1, "tensorboard": False}},
    "sampling": {"prompts": []},
    "selection": {"strategy": "last", "metrics": []},
}


def setting(resolution: int, batch: int, steps: int, **changes: Any) -> dict[str, Any]:
    fixed = {
        "dataset": {"resolution": resolution, "batch_size": batch},
        "training": {"max_train_steps": steps, "checkpoints": {"every_n_steps": steps}},
    }
    return merged(merged(BASE, fixed), changes)


ON_CPU = {
    "micro LoRA, 32², batch 16": setting(32, 16, 120, model={"checkpoint": "builtin:micro"}),
    "micro full, 32², batch 16": setting(32, 16, 120, model={"checkpoint": "builtin:micro"}, network=None),
    "sd15 LoRA, 256², batch 1": setting(256, 1, 5, model={"checkpoint": "sd15"}),
}
ON_GPU = {
    f"sd15 LoRA, 512², batch {batch}, bf16{', compiled' if compiled else ''}": setting(
        512, batch, 40, model={"checkpoint": "sd15", "dtype": "bf16"}, training={"compile": compiled}
    )
    for batch in (1, 8)
    for compiled in (False, True)
}


def write_folder_model(folder: Path) -> None:
    """SD 1.5 with random weights as a diffusers directory of fp32 files: both sides read the same."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from runner.families.parts.checkpoint import CONFIGS, read_json

    SHIPPED = CONFIGS / "sd15"

    torch.manual_seed(0)
    UNet2DConditionModel.from_config(read_json(SHIPPED / "unet" / "config.json")).save_pretrained(folder / "unet")
    AutoencoderKL.from_config(read_json(SHIPPED / "vae" / "config.json")).save_pretrained(folder / "vae")
    text = CLIPTextModel(CLIPTextConfig(**read_json(SHIPPED / "text_encoder" / "config.json")))
    text.save_pretrained(folder / "text_encoder")
    for name in ("scheduler", "model_index.json"):
        source = SHIPPED / name
        shutil.copytree(source, folder / name) if source.is_dir() else shutil.copyfile(source, folder / name)


def measure(name: str, config: dict[str, Any], folder: Path, model: Path, rounds: int) -> list[dict[str, Any]]:
    from benchmarks.hand_over import hand_over

    resolution, steps = config["dataset"]["resolution"], config["training"]["max_train_steps"]
    draw_pictures(folder / "images", max(8, config["dataset"]["batch_size"]), size=resolution)
    if config["model"]["checkpoint"] == "sd15":
        config = merged(config, {"model": {"checkpoint": str(model)}})
    (folder / "run.toml").write_text(tomlkit.dumps(without_none(config)), encoding="utf-8")
    runner(folder, "apply", "--target", "cache")
    hand_over(folder / "run.toml", folder / "bare", steps)
    found: dict[str, dict[str, list[float]]] = {
        side: {"step": [], "first": [], "peak": []} for side in ("ours", "bare")
    }
    losses: dict[str, list[float]] = {}
    for _ in range(rounds):
        bare = run([sys.executable, str(ROOT / "benchmarks" / "bare_loop.py"), str(folder / "bare")], folder)
        record = json.loads(bare.out.splitlines()[-1])
        note(found["bare"], record["seconds"], record["first_step"], bare.peak)
        losses["bare"] = record["losses"]
        shutil.rmtree(folder / ".runner" / "artifacts", ignore_errors=True)
        shutil.rmtree(folder / "runs", ignore_errors=True)
        ours = runner(folder, "apply", "--target", "train")
        events = [json.loads(line) for line in (folder / "runs/s/logs/events.jsonl").read_text().splitlines()]
        lines = [event for event in events if event["type"] == "step"]
        times = [b["time"] - a["time"] for a, b in itertools.pairwise(lines)]
        note(found["ours"], [0.0, *times], ours.seconds - (events[-1]["time"] - lines[0]["time"]), ours.peak)
        losses["ours"] = [line["loss"] for line in lines]
    worst = max(abs(a - b) / b for a, b in zip(losses["ours"], losses["bare"], strict=True))
    rows = []
    for what, unit, scale in (("step", "s", 1.0), ("first", "s", 1.0), ("peak", "GB", GB)):
        ours, bare = (median(found[side][what]) / scale for side in ("ours", "bare"))
        label = {"step": "training step", "first": "process start to end of step 1", "peak": "peak memory"}[what]
        rows.append(
            {
                "setting": name,
                "what": f"{label} ({unit})",
                "ours": ours,
                "bare": bare,
                "ratio": ours / bare,
                "losses_differ_by": f"{worst:.0e}",
            }
        )
    return rows


def note(side: dict[str, list[float]], seconds: list[float], first: float, peak: float) -> None:
    """A round's figures; the first steps, which warm up, are left out of the step time."""
    side["step"].append(median(seconds[max(1, len(seconds) // 10) :]))
    side["first"].append(first)
    side["peak"].append(peak)


@click.command(help=__doc__)
@click.option("--only", multiple=True)
@click.option("--rounds", default=3)
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(only: tuple[str, ...], rounds: int, out: Path | None) -> None:
    import torch

    settings = {**ON_CPU, **(ON_GPU if torch.cuda.is_available() else {})}
    chosen = {name: config for name, config in settings.items() if not only or any(part in name for part in only)}
    root = Path(tempfile.mkdtemp(prefix="runner-step-"))
    rows: list[dict[str, Any]] = []
    try:
        if any(config["model"]["checkpoint"] == "sd15" for config in chosen.values()):
            write_folder_model(root / "sd15")
        for index, (name, config) in enumerate(chosen.items()):
            folder = root / str(index)
            folder.mkdir()
            rows += measure(name, config, folder, root / "sd15", rounds)
            click.echo(
                f"{name}: step {rows[-3]['ratio']:.3f}, first {rows[-2]['ratio']:.3f}, peak {rows[-1]['ratio']:.3f}",
                err=True,
            )
        report("Against a bare PyTorch loop", rows, out)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
