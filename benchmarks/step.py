"""Training step, peak memory, cache stage and first step against a bare PyTorch loop (benchmarks/bare_loop.py).

    python -m benchmarks.step [--only NAME …] [--rounds 3] [--json FILE]

Both train the same model on the same batches and must have the same losses. They take turns, each in a process of its
own. "first step" is the time from the process's start to the end of its first step, with warm caches. On a machine
with a GPU the settings of SD 1.5 at 512² and of SDXL and SD3 at 1024² run too, with images a second and the share of
the GPU's peak.
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


FAMILIES = ("sd15", "sdxl", "sd3")


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
    **{
        f"sd15 LoRA, 512², batch {batch}, bf16{', compiled' if compiled else ''}": setting(
            512, batch, 40, model={"checkpoint": "sd15", "dtype": "bf16"}, training={"compile": compiled}
        )
        for batch in (1, 8)
        for compiled in (False, True)
    },
    **{
        f"{family} LoRA, 1024², batch {batch}, bf16, compiled{'' if deterministic else ', not deterministic'}": setting(
            1024,
            batch,
            30,
            model={"family": family, "checkpoint": family, "dtype": "bf16"},
            network={"targets": "attention"},
            training={"compile": True},
            run={"deterministic": deterministic},
        )
        for family in ("sdxl", "sd3")
        for batch in (1, 4, 8)
        for deterministic in (True, False)
    },
}
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}
"""bf16 operations a second without sparsity, as the makers say; by part of the device's name."""


def write_folder_model(folder: Path, family: str) -> None:
    """A full-size model with random weights as a diffusers directory: both sides read the same. SD3 without T5."""
    import torch

    from runner.families.parts.files import CONFIGS, read_json
    from runner.families.parts.modules import make_module
    from runner.families.sd.spec import SD15_FINDER, SDXL_FINDER
    from runner.families.sd3.spec import FINDER as SD3

    torch.manual_seed(0)
    finder = {"sd15": SD15_FINDER, "sdxl": SDXL_FINDER, "sd3": SD3}[family]
    for part in finder.parts:
        if part.name == "text_encoder_3":
            continue
        module: Any = make_module(part.module, read_json(finder.shipped / part.folder / "config.json"))
        module.to(torch.float32 if family == "sd15" else torch.bfloat16).save_pretrained(folder / part.folder)
    for name in ("scheduler", "model_index.json"):
        source = CONFIGS / family / name
        shutil.copytree(source, folder / name) if source.is_dir() else shutil.copyfile(source, folder / name)


def measure(name: str, config: dict[str, Any], folder: Path, models: Path, rounds: int) -> list[dict[str, Any]]:
    import torch

    from benchmarks.hand_over import hand_over

    resolution, steps = config["dataset"]["resolution"], config["training"]["max_train_steps"]
    draw_pictures(folder / "images", max(8, config["dataset"]["batch_size"]), size=resolution)
    if config["model"]["checkpoint"] in FAMILIES:
        config = merged(config, {"model": {"checkpoint": str(models / config["model"]["checkpoint"])}})
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
    if record["flops"] and torch.cuda.is_available():
        peak = next((value for part, value in PEAKS.items() if part in torch.cuda.get_device_name(0)), None)
        for side in ("ours", "bare"):
            seconds = median(found[side]["step"])
            images = config["dataset"]["batch_size"] / seconds
            share = record["flops"] / seconds / peak if peak else float("nan")
            click.echo(f"{name}: {side}: {images:.2f} images/s, {share:.1%} of the peak of bf16", err=True)
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
        for family in FAMILIES:
            if any(config["model"]["checkpoint"] == family for config in chosen.values()):
                write_folder_model(root / family, family)
        for index, (name, config) in enumerate(chosen.items()):
            folder = root / str(index)
            folder.mkdir()
            rows += measure(name, config, folder, root, rounds)
            click.echo(
                f"{name}: step {rows[-3]['ratio']:.3f}, first {rows[-2]['ratio']:.3f}, peak {rows[-1]['ratio']:.3f}",
                err=True,
            )
        report("Against a bare PyTorch loop", rows, out)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
