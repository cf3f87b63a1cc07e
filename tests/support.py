"""What the tests share: a tiny model and dataset made once, run.toml files, and the command line as a subprocess."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomlkit

from tests.forked import forked
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


VIDEO: dict[str, Any] = {"dataset": {"resolution": [32, 32]}, "sampling": {"width": 32, "height": 32}}
FAMILY: dict[str, dict[str, Any]] = {
    "hunyuan_video": VIDEO,
    "chroma": {"dataset": {"resolution": 32}, "sampling": {"width": 32, "height": 32}},
    "flux1": {"dataset": {"resolution": 32}, "sampling": {"width": 32, "height": 32}},
    "framepack": {
        "model": {"variant": "one_frame", "latent_window_size": 2},
        "dataset": {"resolution": [32, 32], "sources": [{"path": "pics", "control_path": "pics"}]},
        "sampling": {
            "width": 32,
            "height": 32,
            "prompts": [{"prompt": "a red circle", "control_images": ["pics/0.png"]}],
        },
    },
}
"""What a run.toml on pictures needs for a family's tiny model."""


def family_changes(name: str) -> dict[str, Any]:
    """The changes that make the tiny run one of a family."""
    return merged(FAMILY.get(name, {}), {"model": {**FAMILY.get(name, {}).get("model", {}), "family": name}})


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
        self,
        *arguments: str,
        kill: str | None = None,
        env: dict[str, str] | None = None,
        text: str | None = None,
        fresh: bool = False,
    ) -> Result:
        """The command line in this folder, in a process of its own. `kill` is a place for tests/faults; `fresh` starts
        Python anew, where what it imports and its hashes count.
        """
        environment = {**os.environ, "RUNNER_STORE": "", "NO_COLOR": "1", "PYTHONDONTWRITEBYTECODE": "1", **(env or {})}
        environment.pop("RUNNER_STORE") if not environment["RUNNER_STORE"] else None
        environment["PYTHONPATH"] = str(ROOT)  # this checkout, whatever is installed
        if kill is not None:
            environment["RUNNER_TEST_KILL"] = kill
            environment["PYTHONPATH"] = os.pathsep.join([str(FAULTS), str(ROOT)])
        if not fresh:
            return self._forked(arguments, environment, text)
        done = subprocess.run(
            [sys.executable, "-m", "runner", *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
            input=text,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def _forked(self, arguments: Sequence[str], environment: dict[str, str], text: str | None) -> Result:
        with tempfile.TemporaryDirectory() as folder:
            files = Path(folder, "in"), Path(folder, "out"), Path(folder, "err")
            for file in files:
                file.touch()
            files[0].write_text(text or "", encoding="utf-8")
            code = forked(arguments, self.folder, environment, files)
            out, err = (file.read_text(encoding="utf-8") for file in files[1:])
        return Result(code, out, err)

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


def draw_clip(path: Path, frames: int, size: tuple[int, int] = (64, 48), seed: int = 0, fps: int = 24) -> Path:
    """A video of a pattern that moves, with a bar whose width tells the frame: the same bytes each time."""
    import numpy as np
    import torch

    from runner.data.videos import mp4_bytes

    path.parent.mkdir(parents=True, exist_ok=True)
    ground = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    pictures = []
    for index in range(frames):
        picture = np.ascontiguousarray(np.roll(ground, index, axis=1))
        picture[:, : index % size[0]] = [index * 3 % 255, 80, 120]
        pictures.append(picture)
    pixels = torch.from_numpy(np.stack(pictures)).permute(3, 0, 1, 2) / 127.5 - 1
    path.write_bytes(mp4_bytes(pixels, fps))
    return path


def draw_clips(folder: Path, lengths: Sequence[int], size: tuple[int, int] = (64, 48)) -> None:
    """Videos of so many frames each, with captions."""
    for index, frames in enumerate(lengths):
        draw_clip(folder / f"{index}.mp4", frames, size, index)
        (folder / f"{index}.txt").write_text(f"thing number {index} moves", encoding="utf-8")


def run_bytes(output: Path) -> dict[str, bytes]:
    """The files of a run's folder that must be equal between equal runs."""
    names = [
        *output.glob("checkpoints/*"),
        *output.glob("samples/*"),
        output / "best.safetensors",
        output / "selection.json",
        output / "strip.png",
    ]
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(names) if path.is_file()}
