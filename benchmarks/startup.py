"""Start-up and planning: --help, validate, plan and a no-op apply of 1,000 items, plan of 100,000, all warm.

    python -m benchmarks.startup [--items 1000] [--many 100000] [--repeats 5] [--json FILE]

Commands take turns, beside `python -c pass`, so that a slow moment of the machine touches all of them alike.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import click
import tomlkit
from PIL import Image

from benchmarks.measure import report, run, runner
from tests.support import TINY, merged, without_none


def make_items(folder: Path, count: int) -> None:
    """Tiny pictures, each of its own, with captions."""
    folder.mkdir(parents=True)
    for index in range(count):
        colour = (index % 256, index // 256 % 256, index // 65536)
        Image.new("RGB", (16, 16), colour).save(folder / f"{index:06d}.png", compress_level=1)
        (folder / f"{index:06d}.txt").write_text(f"picture {index}", encoding="utf-8")


def place(folder: Path, count: int) -> Path:
    from runner.families.sd.tiny import write_tiny

    write_tiny(folder / "model")
    make_items(folder / "pics", count)
    config: dict[str, Any] = merged(
        TINY,
        {
            "dataset": {"resolution": 16, "held_out": {"count": 2}},
            "training": {"max_train_steps": 1, "checkpoints": {"every_n_steps": 1}},
            "sampling": {"prompts": []},
        },
    )
    (folder / "run.toml").write_text(tomlkit.dumps(without_none(config)), encoding="utf-8")
    return folder


@click.command(help=__doc__)
@click.option("--items", default=1000)
@click.option("--many", default=100_000)
@click.option("--repeats", default=5)
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(items: int, many: int, repeats: int, out: Path | None) -> None:
    folder = Path(tempfile.mkdtemp(prefix="runner-startup-"))
    try:
        few = place(folder / "few", items)
        click.echo("applying once", err=True)
        runner(few, "apply")
        commands: dict[str, tuple[Path, tuple[str, ...], str]] = {
            "runner --help": (few, ("--help",), "0.15"),
            f"validate, {items:,} items": (few, ("validate", "run.toml"), "0.4"),
            f"plan, {items:,} items": (few, ("plan", "run.toml"), "0.4"),
            f"apply with nothing to do, {items:,} items": (few, ("apply", "run.toml"), "0.5"),
        }
        cold = None
        if many:
            lot = place(folder / "many", many)
            click.echo(f"cold plan of {many:,} items", err=True)
            cold = runner(lot, "plan").seconds
            commands[f"plan, {many:,} items"] = (lot, ("plan", "run.toml"), "3")
        seconds: dict[str, list[float]] = {name: [] for name in ("python -c pass", *commands)}
        for turn in range(repeats + 1):
            seconds["python -c pass"].append(run([sys.executable, "-c", "pass"], folder).seconds)
            for name, (where, arguments, _) in commands.items():
                seconds[name].append(runner(where, *arguments).seconds)
            if turn == 0:  # warms the disk's cache
                seconds = {name: [] for name in seconds}
        rows = [
            {
                "command": name,
                "median_s": median(taken),
                "least_s": min(taken),
                "reach_s": commands[name][2] if name in commands else "",
            }
            for name, taken in seconds.items()
        ]
        if cold is not None:
            rows.append(
                {
                    "command": f"plan, {many:,} items, cold (decodes each)",
                    "median_s": cold,
                    "least_s": cold,
                    "reach_s": "",
                }
            )
        report("Start-up and planning", rows, out)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
