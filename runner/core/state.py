"""What a resume needs: trained tensors, optimizer, average, counters. A state is there whole or not at all.

A state is a folder `state-<step>` with safetensors files, counters.json, and manifest.json with the digest of each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from runner.atomic import make_folder, new_folder, remove, sweep, write_json
from runner.files import file_digest
from runner.records import DamagedRecord, read_record, write_record
from runner.weights.tensors import write_tensors

STATE_VERSION = 1
WHOLE = frozenset({"counters.json", "weights.safetensors", "optimizer.safetensors"})
"""Files that every state has."""
KEPT_STATES = 2
"""The newest, and one before it in case the newest is damaged."""


@dataclass
class State:
    """`groups` is file name → tensors ("weights", "optimizer", "ema"); `counters` is everything that is no tensor."""

    step: int
    groups: dict[str, dict[str, Tensor]]
    counters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Damaged:
    """A state that could not be used, and why."""

    folder: Path
    reason: str


def save_state(parent: Path, state: State) -> Path:
    """Writes a state: staged under another name, synced, renamed once. Then drops the older ones."""
    make_folder(parent)
    sweep(parent)
    folder = parent / f"state-{state.step:08d}"
    remove(folder)
    with new_folder(folder) as staged:
        for name, tensors in state.groups.items():
            write_tensors(staged / f"{name}.safetensors", tensors)
        write_json(staged / "counters.json", {"step": state.step, **state.counters})
        digests = {file.name: file_digest(file) for file in sorted(staged.iterdir())}
        write_record(staged / "manifest.json", {"version": STATE_VERSION, "step": state.step, "files": digests})
    for old in state_folders(parent)[:-KEPT_STATES]:
        remove(old)
    return folder


def state_folders(parent: Path) -> list[Path]:
    """The states there are, oldest first."""
    if not parent.is_dir():
        return []
    return sorted(
        entry for entry in parent.iterdir() if re.fullmatch(r"state-[0-9]{8,18}", entry.name) and entry.is_dir()
    )


def load_newest(parent: Path, up_to: int | None = None) -> tuple[State | None, list[Damaged]]:
    """The newest valid state (of at most step `up_to`), and the newer ones that are damaged."""
    damaged: list[Damaged] = []
    for folder in reversed(state_folders(parent)):
        if up_to is not None and int(folder.name.removeprefix("state-")) > up_to:
            continue
        try:
            return _load(folder), damaged
        except (OSError, ValueError, KeyError, TypeError, DamagedRecord, SafetensorError) as error:
            damaged.append(Damaged(folder, str(error)))
    return None, damaged


def _load(folder: Path) -> State:
    manifest = read_record(folder / "manifest.json", {"version": int, "step": int, "files": {str: str}})
    if manifest is None:
        raise ValueError("it has no manifest")
    if not manifest["files"].keys() >= WHOLE:
        raise ValueError("its manifest does not name all its files")
    if manifest["version"] > STATE_VERSION:
        raise ValueError(f"it was written by a newer runner (state version {manifest['version']})")
    for name, digest in manifest["files"].items():
        if Path(name).name != name:
            raise ValueError(f"its manifest names a file outside: {name}")
        if file_digest(folder / name) != digest:
            raise ValueError(f"{name} is not what was written")
    counters = json.loads((folder / "counters.json").read_text(encoding="utf-8"))
    groups = {Path(name).stem: load_file(folder / name) for name in manifest["files"] if name.endswith(".safetensors")}
    return State(counters.pop("step"), groups, counters)


def flatten_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state dict as tensors (`<parameter>/<name>/…`) and the rest; no pickle is written or read."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}

    def walk(node: Mapping[str, Any], path: str) -> None:
        for name, value in node.items():
            here = f"{path}/{name}"
            if isinstance(value, Tensor):
                tensors[here] = value
            elif isinstance(value, Mapping):  # bitsandbytes keeps its quantized states one level down
                walk(value, here)
            else:
                scalars[here] = value

    for index, entries in state["state"].items():
        walk(entries, str(index))
    groups = [{name: value for name, value in group.items() if name != "params"} for group in state["param_groups"]]
    return tensors, {"scalars": scalars, "groups": groups}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """The reverse of `flatten_optimizer`, into an optimizer over the same parameters."""
    current = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Any]] = {}
    for path, value in {**tensors, **rest["scalars"]}.items():
        index, *parents, name = path.split("/")
        node = entries.setdefault(int(index), {})
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = _laid_out(value, parameters[int(index)]) if isinstance(value, Tensor) else value
    groups = []
    for group, saved in zip(current["param_groups"], rest["groups"], strict=True):
        groups.append({**group, **_tuples(saved), "params": group["params"]})
    optimizer.load_state_dict({"state": entries, "param_groups": groups})


def _laid_out(tensor: Tensor, parameter: Tensor) -> Tensor:
    """In the parameter's memory layout, as it was made: a file does not keep channels_last."""
    if tensor.shape != parameter.shape or tensor.dim() < 2:
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


def _tuples(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in group.items()}
