"""Finds the file or folder that a model key names: a path, a built-in model, or a hub id in the local hub cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from runner.files import file_problem, near_name, parsing, read_bytes, resolve_path
from runner.model.model import ModelProblem

KeyPath = tuple[str | int, ...]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHT_ENDINGS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".json", ".index")
_WEIGHT_NAMES = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
)


def locate_model(name: str, folder: Path, revision: str | None, builtin: Path, key: KeyPath) -> Path:
    """The file or folder. Relative paths are relative to `folder`. Raises `ModelProblem` at `key`."""
    if name.startswith("builtin:"):
        found = builtin / name.removeprefix("builtin:")
        if not found.is_dir() or found.parent != builtin:
            known = ", ".join(f'"builtin:{entry.name}"' for entry in sorted(builtin.iterdir()) if entry.is_dir())
            raise ModelProblem(key, f'there is no built-in model "{name}"', f"there is {known}")
        return found
    path = resolve_path(name, folder)
    if os.path.exists(path):
        kind = None if path.is_dir() else file_problem(path)
        if kind is not None:
            raise ModelProblem(key, kind, "name a file of weights or a folder")
        return _first_shard(path) or path
    if _HUB_ID.fullmatch(name) and not _is_path(name, path):
        return _in_hub_cache(name, revision or "main", key, path)
    raise ModelProblem(key, f"there is no file or folder {path}", near_name(path))


def _is_path(name: str, path: Path) -> bool:
    """Whether what could be a hub id is meant as a path: by its ending, or because its first folder is there."""
    return name.startswith((".", "~")) or path.suffix.lower() in _WEIGHT_ENDINGS or path.parent.is_dir()


def _first_shard(folder: Path) -> Path | None:
    """The first of the shards in a folder that holds nothing else to tell what it is."""
    if not folder.is_dir() or any((folder / name).exists() for name in ("config.json", "model_index.json")):
        return None
    first = list(folder.glob("*-00001-of-*.safetensors"))
    return first[0] if len(first) == 1 else None


def _in_hub_cache(name: str, revision: str, key: KeyPath, path: Path) -> Path:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    model = cache / f"models--{name.replace('/', '--')}"
    reference = model / "refs" / revision
    commit = revision
    if reference.is_file():
        with parsing(lambda reason: ModelProblem(key, f"{reference} cannot be read: {reason}")):
            commit = read_bytes(reference, 1000).decode("ascii").strip()
    snapshot = model / "snapshots" / commit
    if snapshot.is_dir() and snapshot.parent == model / "snapshots":
        return snapshot
    raise ModelProblem(
        key,
        f"there is no {path}, and the hub model {name} ({revision}) is not in the local hub cache {cache}",
        f"nothing is downloaded while running; fetch it once: hf download {name} --revision {revision}",
    )


def child_folder(place: Path, name: str) -> Path:
    """`place/name` where it is a folder, else `place` itself: a component may be named with or without its pipeline."""
    return place / name if (place / name).is_dir() else place


def weights_in(folder: Path) -> Path | None:
    """The weights file of a component's folder."""
    return next((folder / name for name in _WEIGHT_NAMES if (folder / name).is_file()), None)
