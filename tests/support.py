"""What the tests share: a tiny model and dataset made once, run.toml files, and the command line as a subprocess."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomlkit

from tools.draw_shapes import COLOURS, GROUNDS, SHAPES, caption, drawn_at_random

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).resolve().parent / "data"
FAULTS = Path(__file__).resolve().parent / "faults"

TINY: dict[str, Any] = {
    "schema_version": 1,
    "run": {"name": "t"},
    "model": {"family": "sd15", "checkpoint": "model", "dtype": "fp32"},
    "network": {"rank": 4},
    "dataset": {"batch_size": 2, "held_out": {"count": 2}, "sources": [{"path": "pics"}]},
    "training": {
        "max_train_steps": 6,
        "learning_rate": 1e-3,
        "checkpoints": {"every_n_steps": 2},
        "logging": {"every_n_steps": 1, "tensorboard": False},
    },
    "sampling": {"num_inference_steps": 2, "prompts": [{"prompt": "a red circle"}]},
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A deep copy with changes; a value of None takes a key out when the file is written."""
    result = json.loads(json.dumps(base))
    for name, value in changes.items():
        if value is None:
            result[name] = None
        elif isinstance(value, dict) and isinstance(result.get(name), dict):
            result[name] = merged(result[name], value)
        else:
            result[name] = value
    return result


def without_none(node: Any) -> Any:
    """The configuration without the keys that changes took out."""
    if isinstance(node, dict):
        return {name: without_none(value) for name, value in node.items() if value is not None}
    return [without_none(value) for value in node] if isinstance(node, list) else node


def draw_pictures(folder: Path, count: int, seed: int = 3, size: int = 32) -> None:
    """Pictures of shapes with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for index in range(count):
        shape, colour, ground = rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.choice(list(GROUNDS))
        picture = drawn_at_random(shape, colour, ground, rng)
        picture.resize((size, size)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption(shape, colour, ground), encoding="utf-8")


@dataclass
class Place:
    """A folder with a tiny model, pictures, and run.toml."""

    folder: Path
    base: dict[str, Any] = field(default_factory=dict)
    """Changes that every run.toml of this place has."""

    @property
    def file(self) -> Path:
        return self.folder / "run.toml"

    def write(self, changes: dict[str, Any] | None = None) -> Path:
        """Writes run.toml: the tiny run with changes."""
        content = merged(merged(TINY, self.base), changes or {})
        self.file.write_text(tomlkit.dumps(without_none(content)), encoding="utf-8")
        return self.file

    def text(self, content: str) -> Path:
        """Writes run.toml as given."""
        self.file.write_text(content, encoding="utf-8")
        return self.file

    def run(
        self, *arguments: str, kill: str | None = None, env: dict[str, str] | None = None, text: str | None = None
    ) -> Result:
        """The command line in this folder. `kill` is a place for tests/faults."""
        environment = {**os.environ, "RUNNER_STORE": "", "NO_COLOR": "1", "PYTHONDONTWRITEBYTECODE": "1", **(env or {})}
        environment.pop("RUNNER_STORE") if not environment["RUNNER_STORE"] else None
        if kill is not None:
            environment["RUNNER_TEST_KILL"] = kill
            environment["PYTHONPATH"] = str(FAULTS)
        done = subprocess.run(
            [sys.executable, "-m", "runner", *arguments], cwd=self.folder, env=environment, capture_output=True, text=True,
            timeout=600, check=False, input=text,
        )  # fmt: skip
        return Result(done.returncode, done.stdout, done.stderr)

    @property
    def output(self) -> Path:
        return self.folder / "runs" / "t"


@dataclass
class Result:
    """What a command gave back."""

    code: int
    out: str
    err: str

    def ok(self) -> Result:
        """Itself, where the command succeeded."""
        assert self.code == 0, f"exit {self.code}\n{self.out}\n{self.err}"
        return self


def new_place(folder: Path, model: Path, pictures: int = 10) -> Place:
    """A place of its own with a copy of the model and fresh pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(model, folder / "model")
    draw_pictures(folder / "pics", pictures)
    place = Place(folder)
    place.write()
    return place


def run_bytes(output: Path) -> dict[str, bytes]:
    """The files of a run's folder that must be equal between equal runs."""
    names = [
        *output.glob("checkpoints/*"),
        *output.glob("samples/*.png"),
        output / "best.safetensors",
        output / "selection.json",
        output / "strip.png",
    ]
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(names) if path.is_file()}
