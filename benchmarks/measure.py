"""What the benchmarks share: a child's time and peak memory, the machine in words, tables, JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
GB = 1e9
LIBRARIES = (
    "from runner.core.process import prepare_environment; prepare_environment();"
    "import torch, peft, accelerate, bitsandbytes; import runner.execute.apply, runner.families.sd.model;"
    "from diffusers import DDIMScheduler; torch.zeros(8).sum().item()"
)


_SPAWN = """
import json, os, sys, time
began = time.perf_counter()
child = os.spawnvp(os.P_NOWAIT, sys.argv[2], sys.argv[2:])
_, status, usage = os.wait4(child, 0)
with open(sys.argv[1], "w") as stream:
    json.dump([os.waitstatus_to_exitcode(status), time.perf_counter() - began, usage.ru_maxrss], stream)
"""
"""A small process between: a child's peak starts from its parent's, which may have written a whole model."""


@dataclass(frozen=True)
class Run:
    """A finished child: exit code, seconds, peak resident bytes, its output."""

    code: int
    seconds: float
    peak: int
    out: str


def run(command: Sequence[str], folder: Path, env: dict[str, str] | None = None) -> Run:
    """Runs a command and measures it. Raises `RuntimeError` with its output where it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    with tempfile.NamedTemporaryFile("r") as measured:
        spawn = [sys.executable, "-ISc", _SPAWN, measured.name, *command]
        done = subprocess.run(
            spawn, cwd=folder, capture_output=True, encoding="utf-8", errors="replace", env=environment
        )
        code, seconds, peak = json.load(measured)
    if code not in (0, 2):
        raise RuntimeError(f"{' '.join(command)} left with {code}:\n{done.stderr[-4000:]}")
    return Run(code, seconds, peak * (1 if sys.platform == "darwin" else 1024), done.stdout)


def runner(folder: Path, *arguments: str) -> Run:
    """`python -m runner …` in a folder."""
    return run([sys.executable, "-m", "runner", *arguments], folder)


def libraries_bytes(folder: Path) -> int:
    """What the libraries take by themselves, once imported."""
    return run([sys.executable, "-c", LIBRARIES], folder).peak


def machine() -> dict[str, str]:
    """Where the figures were measured."""
    import torch

    model = platform.processor()
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        lines = [line for line in cpu.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    found = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": model,
        "cores": str(os.cpu_count()),
        "memory_gb": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GB:.0f}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "diffusers": version("diffusers"),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
    return found


def report(title: str, rows: list[dict[str, Any]], out: Path | None) -> None:
    """Prints the machine and a table, and writes both as JSON where asked."""
    console = Console(width=160)
    where = machine()
    console.print(", ".join(f"{name} {value}" for name, value in where.items()))
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    if out is not None:
        out.write_text(json.dumps({"title": title, "machine": where, "rows": rows}, indent=2) + "\n", encoding="utf-8")
