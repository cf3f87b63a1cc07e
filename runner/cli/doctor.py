"""runner doctor."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path

import click

from runner.cli import out
from runner.errors import Exit

_NEEDED = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "pillow",
    "pydantic",
    "tensorboard",
)
_OPTIONAL = {"bitsandbytes": 'training.optimizer.type = "adamw8bit"'}


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("."))
def command(folder: Path) -> int:
    """Check Python, packages, devices, the store and the disk."""
    import psutil

    from runner.store.store import find_store

    problems = 0
    out.data(f"python        {platform.python_version()} on {sys.platform}-{platform.machine()}")
    out.data(f"processor     {os.cpu_count()} cores, {psutil.virtual_memory().total / 1e9:.1f} GB memory")
    for name in _NEEDED:
        try:
            out.data(f"{name:<13} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            out.data(f"{name:<13} MISSING")
            problems += 1
    for name, use in _OPTIONAL.items():
        try:
            out.data(f"{name:<13} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            out.data(f"{name:<13} not installed; needed for {use}")
    for line in _devices():
        out.data(f"device        {line}")
    store = find_store(folder)
    place = store.root if store.root.exists() else folder
    writable = os.access(place, os.W_OK)
    problems += 0 if writable else 1
    out.data(f"store         {store.root}" + ("" if writable else " CANNOT BE WRITTEN: set RUNNER_STORE"))
    out.data(f"disk          {shutil.disk_usage(place).free / 1e9:.1f} GB free")
    out.say("everything is in place" if not problems else f"{problems} problems")
    return Exit.DONE if not problems else Exit.FAILED


def _devices() -> list[str]:
    from runner.core.process import prepare_environment

    prepare_environment()
    try:
        import torch
    except ImportError:
        return ["torch cannot be imported"]
    if not torch.cuda.is_available():
        return [f"cpu, {torch.get_num_threads()} threads (no CUDA GPU is seen)"]
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: use fp16"
        found.append(f"cuda:{number} {properties.name}, {properties.total_memory / 1e9:.1f} GB, {bf16}")
    return found
