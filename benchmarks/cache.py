"""The cache stage against a plain batched encode loop (benchmarks/bare_encode.py), in turns, each in its own process.

python -m benchmarks.cache [--pictures 24] [--size 256] [--rounds 2] [--json FILE]
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import click
import tomlkit

from benchmarks.measure import ROOT, report, run, runner
from benchmarks.step import BASE, write_folder_model
from tests.support import draw_pictures, merged, without_none

BATCH = 4


@click.command(help=__doc__)
@click.option("--pictures", default=24)
@click.option("--size", default=256)
@click.option("--rounds", default=2)
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(pictures: int, size: int, rounds: int, out: Path | None) -> None:
    folder = Path(tempfile.mkdtemp(prefix="runner-cache-"))
    try:
        write_folder_model(folder / "sd15")
        draw_pictures(folder / "images", pictures, size=size)
        changes = {
            "model": {"checkpoint": "sd15"},
            "dataset": {"resolution": size},
            "training": {"max_train_steps": 1, "checkpoints": {"every_n_steps": 1}},
            "caching": {"latent_batch_size": BATCH},
        }
        (folder / "run.toml").write_text(tomlkit.dumps(without_none(merged(BASE, changes))), encoding="utf-8")
        found: dict[str, dict[str, list[float]]] = {side: {"stage": [], "all": []} for side in ("ours", "bare")}
        for _ in range(rounds):
            arguments = ["sd15/vae", "images", str(size), str(BATCH), "encoded"]
            bare = json.loads(
                run([sys.executable, str(ROOT / "benchmarks" / "bare_encode.py"), *arguments], folder).out
            )
            found["bare"]["stage"].append(bare["stage"])
            found["bare"]["all"].append(bare["all"])
            shutil.rmtree(folder / ".runner", ignore_errors=True)
            shutil.rmtree(folder / "runs", ignore_errors=True)
            runner(folder, "plan")  # decodes and digests, as any earlier plan would have
            ours = runner(folder, "apply", "--target", "cache.latents")
            events = [json.loads(line) for line in (folder / "runs/s/logs/events.jsonl").read_text().splitlines()]
            found["ours"]["stage"].append(events[-1]["time"] - events[0]["time"])
            found["ours"]["all"].append(ours.seconds)
        rows: list[dict[str, Any]] = [
            {
                "what": f"{label}, {pictures} pictures at {size}²",
                "ours_s": median(found["ours"][key]),
                "bare_s": median(found["bare"][key]),
                "ratio": median(found["ours"][key]) / median(found["bare"][key]),
            }
            for key, label in (("stage", "cache stage, with loading"), ("all", "the whole process"))
        ]
        report("Cache stage", rows, out)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
