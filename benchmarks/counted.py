"""Counts what a step asks of a device: operations, FLOP, bytes moved, bytes kept for the backward pass, waits."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.pretended import SYNCHRONIZE, running

LAUNCH, HOST = 2.5e-6, 8e-6
"""Seconds that an operation takes at least, of the device and of the host (measured by others, /docs/performance.md)."""
FLOPS_SHARE, BYTES_SHARE = 0.75, 0.85
KINDS = ("gemm", "convolution", "attention", "casts", "copies", "norms", "elementwise", "reductions", "optimizer")
HEAVY = ("gemm", "convolution", "attention")
_NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias"}
_NOTHING |= {"set_", "lift_fresh", "resize_", "record_stream", "_local_scalar_dense", "is_nonzero", "equal"}
_GEMM = {"mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "addmv", "mv", "dot"}
_COPIES = {"clone", "copy_", "cat", "stack", "constant_pad_nd", "repeat", "index", "select_backward", "slice_backward"}
_COPIES |= {"gather", "embedding", "index_select", "roll", "flip", "split_with_sizes_copy"}
_REDUCTIONS = {
    "sum",
    "mean",
    "var",
    "var_mean",
    "amax",
    "amin",
    "max",
    "min",
    "linalg_vector_norm",
    "norm",
    "any",
    "all",
}
_UNREAD = {"copy_", "fill_", "zero_"}
"""They write into their first argument without reading it."""
_A_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36}
"""Tensors that one launch of a multi-tensor kernel takes, by the number of its lists (MultiTensorApply.cuh)."""


@dataclass(frozen=True)
class Card:
    """Operations a second in bf16 without sparsity, and bytes a second, as NVIDIA's data sheets say them."""

    flops: float
    bandwidth: float


CARDS = {
    "H100": Card(989e12, 3.35e12),
    "A100": Card(312e12, 2.04e12),
    "RTX 4090": Card(165e12, 1.01e12),
    "RTX 3090": Card(71e12, 0.936e12),
}
"""SXM5 of 80 GB (H100 data sheet, 2023), SXM4 of 80 GB (A100 data sheet, 2021), Ada whitepaper 2.1 (2023), Ampere GA102
whitepaper 2.1 (2021); of the last two with fp32 sums."""


@dataclass(kw_only=True)
class Count:
    """What was counted of one step."""

    operations: Counter[str] = field(default_factory=Counter)
    """Kind → calls on the device that are no views."""
    names: Counter[str] = field(default_factory=Counter)
    """aten's name → calls."""
    moved: Counter[str] = field(default_factory=Counter)
    """Kind → bytes read and written."""
    launches: int = 0
    flop: int = 0
    kept: int = 0
    waits: int = 0
    """How often the host waits for the device, for a number or for all that it has to do."""
    phases: Counter[str] = field(default_factory=Counter)
    """forward, backward, optimizer → operations."""
    seconds: Counter[str] = field(default_factory=Counter)
    """Card → predicted seconds of the device."""
    times: dict[str, Counter[str]] = field(default_factory=dict)
    """Card → kind → the same."""
    callers: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(aten's name, who called it) → calls, where callers were asked for."""

    @property
    def total(self) -> int:
        return self.operations.total()

    @property
    def host(self) -> float:
        return HOST * self.total

    def exact(self) -> dict[str, Any]:
        """What a test may hold: no times."""
        return {
            "operations": dict(sorted(self.operations.items())),
            "phases": dict(sorted(self.phases.items())),
            "launches": self.launches,
            "flop": self.flop,
            "moved": dict(sorted(self.moved.items())),
            "kept": self.kept,
            "waits": self.waits,
        }


class Meter:
    """Told of each operation on the device; counts those that come while `on` is set."""

    def __init__(self, callers: bool = False) -> None:
        self.count = Count(times={name: Counter() for name in CARDS})
        self.on = False
        self.phase = "forward"
        self.callers = callers

    def __call__(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], answer: Any) -> None:
        if not self.on:
            return
        if func is SYNCHRONIZE:
            self.count.waits += 1
            return
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(answer) if isinstance(x, Tensor)]
        if not any(isinstance(x, FakeTensor) and x.device.type == "cuda" for x in (*given, *made)):
            return
        name = func._schema.name.split("::")[1]
        reads = name in ("_local_scalar_dense", "is_nonzero", "equal")
        self.count.waits += reads or any(not isinstance(x, FakeTensor) for x in made)
        if func.is_view or name in _NOTHING:
            return
        self._add(func, name, args, kwargs, given, made, answer)

    def _add(
        self,
        func: Any,
        name: str,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        given: list[Tensor],
        made: list[Tensor],
        answer: Any,
    ) -> None:
        count = self.count
        kind = kind_of(func, name, args, kwargs, self.phase)
        moved = bytes_of(func, name, args, kwargs, given, made)
        formula = flop_registry.get(func.overloadpacket)
        flop = int(formula(*args, **kwargs, out_val=answer)) if formula is not None else 0
        launches = launches_of(name, args)
        count.operations[kind] += 1
        count.names[name] += 1
        count.moved[kind] += moved
        count.phases[self.phase] += 1
        count.launches += launches
        count.flop += flop
        for title, card in CARDS.items():
            seconds = max(flop / (FLOPS_SHARE * card.flops), moved / (BYTES_SHARE * card.bandwidth), LAUNCH * launches)
            count.times[title][kind] += seconds
            count.seconds[title] += seconds
        if self.callers:
            count.callers[name, caller()] += 1


def kind_of(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], phase: str) -> str:
    """One of `KINDS`."""
    if phase == "optimizer" or func.namespace == "bitsandbytes":
        return "optimizer"
    if name == "_to_copy":
        return "casts" if kwargs.get("dtype") not in (None, args[0].dtype) else "copies"
    if "attention" in name:
        return "attention"
    if "convolution" in name:
        return "convolution"
    if name in _GEMM:
        return "gemm"
    if name.endswith(("_norm", "_norm_backward")) and name.startswith(("native_", "_fused_rms")):
        return "norms"
    if name in _COPIES:
        return "copies"
    return "reductions" if name in _REDUCTIONS else "elementwise"


def size_of(x: Tensor) -> int:
    """Bytes of memory that lie behind a tensor: what was expanded is there once."""
    if not isinstance(x, FakeTensor) or x.device.type != "cuda":
        return 0
    sides = [side for side, step in zip(x.shape, x.stride(), strict=True) if step or side == 1]
    return math.prod(sides) * x.element_size() if x.numel() else 0


def bytes_of(
    func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], given: list[Tensor], made: list[Tensor]
) -> int:
    """What an operation reads and writes, each tensor once."""
    known = {id(x): x for x in given}
    read = sum(size_of(x) for x in known.values())
    if name in _UNREAD:
        read -= size_of(args[0])
    written = {id(x): x for x in made if id(x) not in known}
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            written |= {id(x): x for x in tree_leaves(value) if isinstance(x, Tensor)}
    return read + sum(size_of(x) for x in written.values())


def launches_of(name: str, args: Sequence[Any]) -> int:
    """One, but for kernels over lists of tensors."""
    lists = [x for x in args if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor)]
    if not name.startswith(("_foreach", "_fused_adam", "_amp_foreach")) or not lists:
        return 1
    return math.ceil(len(lists[0]) / _A_LAUNCH.get(len(lists), 36 if name.startswith("_fused") else 30))


@cache
def _place(file: str) -> str | None:
    """A file as the place of a caller; None for PyTorch and for what counts."""
    path = Path(file)
    if {"torch", "benchmarks"} & {*path.parts[-6:]} or path.name in ("contextlib.py", "peft_utils.py"):
        return None
    return f"{path.parent.name}/{path.stem}"


def caller() -> str:
    """The function of ours, of diffusers or of peft that an operation comes from; in the backward pass its node."""
    if running:
        return running[0]
    frame: Any = sys._getframe(1)
    while frame is not None:
        place = _place(frame.f_code.co_filename)
        if place is not None:
            return f"{place}: {frame.f_code.co_qualname}"
        frame = frame.f_back
    return "?"


@contextmanager
def keeping(meter: Meter, weights: Iterable[Tensor]) -> Iterator[None]:
    """Adds up what autograd keeps for the backward pass: each storage once, no weights."""
    seen = {x.untyped_storage()._cdata: x.untyped_storage() for x in weights}

    def keep(x: Tensor) -> Tensor:
        if isinstance(x, FakeTensor) and x.device.type == "cuda":
            storage = x.untyped_storage()
            if storage._cdata not in seen:
                seen[storage._cdata] = storage  # held, so that no other one gets its address
                if meter.on:
                    meter.count.kept += storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield
