"""Encoded items: written to and read from the store with a checksum, or held in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from threading import Lock
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from runner.atomic import new_file
from runner.store.index import stamp
from runner.store.store import Store
from runner.weights.tensors import tensor_bytes, tensors_digest

MEMORY_BUDGET = 2**30
"""Bytes of encodings that a reader keeps in memory, so that a small dataset is read from disk once."""


class DamagedItem(Exception):
    """An item's file is missing or is not what was written; it has to be encoded again."""

    def __init__(self, kind: str, key: str) -> None:
        super().__init__(f"{kind} {key}")
        self.kind, self.key = kind, key


class Encodings(Protocol):
    """Where encodings come from."""

    def get(self, key: str) -> dict[str, Tensor]: ...


def write_item(store: Store, kind: str, key: str, tensors: Mapping[str, Tensor]) -> int:
    """Writes one item and returns its size. Not synced: a checksum tells a torn file, and it can be made again."""
    content = tensor_bytes(tensors, {"sha256": tensors_digest(tensors)})
    with new_file(store.item(kind, key), synced=False) as temporary:
        temporary.write_bytes(content)
    return len(content)


def read_item(store: Store, kind: str, key: str, anew: bool = False) -> dict[str, Tensor]:
    """Reads one item. Its digest is checked once in a process, and again where its file is another by now; with `anew` in
    any case. Raises `DamagedItem`."""
    file, checked = store.item(kind, key), store.checked[kind]
    try:
        found = stamp(os.stat(file))
        with safe_open(file, framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            expected = (stream.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        raise DamagedItem(kind, key) from None
    if anew or checked.get(key) != found:
        if tensors_digest(tensors) != expected:
            raise DamagedItem(kind, key)
        checked[key] = found
    return tensors


class StoredEncodings:
    """Items of one kind in a store; small ones stay in memory after the first read."""

    def __init__(self, store: Store, kind: str) -> None:
        self.store, self.kind = store, kind
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._bytes = 0
        self._lock = Lock()

    def get(self, key: str) -> dict[str, Tensor]:
        found = self._kept.get(key)
        if found is None:
            found = read_item(self.store, self.kind, key)
            size = sum(tensor.numel() * tensor.element_size() for tensor in found.values())
            with self._lock:
                if self._bytes + size <= MEMORY_BUDGET:
                    self._kept[key] = found
                    self._bytes += size
        return found


class HeldEncodings:
    """Items that were encoded in this process and are kept nowhere else."""

    def __init__(self, items: Mapping[str, dict[str, Tensor]]) -> None:
        self.items = dict(items)

    def get(self, key: str) -> dict[str, Tensor]:
        return self.items[key]


def stacked(rows: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Items of equal shapes as one batch.

    NumPy copies, because batches are made in threads of their own: a parallel copy by PyTorch would give each of them a
    team of OpenMP threads, and libgomp lets the training's own team wait less eagerly once there are more than cores.
    """
    rows = list(rows)
    return {name: _stacked([row[name] for row in rows]) for name in rows[0]}


def _stacked(tensors: list[Tensor]) -> Tensor:
    raw = np.stack([tensor.contiguous().view(-1).view(torch.uint8).numpy() for tensor in tensors])
    return torch.from_numpy(raw).view(tensors[0].dtype).view(-1, *tensors[0].shape)
