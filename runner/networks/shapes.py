"""The tensors of an adapter by kind: names and shapes, torch-free. A test compares them with peft's modules.

`component.layer.<name>` is what a checkpoint calls them; lora_A is the down and lora_B the up projection of LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt, prod

from runner.model.targets import Target

Shapes = dict[str, tuple[int, ...]]
BIASES = ("diff_b", "b_norm")
"""The tensors of adapter files that are added to a layer's bias."""


def adapter_shapes(target: Target, decompose_factor: int = -1) -> Shapes:
    """Name → shape of the tensors of one layer's adapter."""
    rank, area = target.rank, target.kernel**2
    kernel = (target.kernel, target.kernel) if target.kind == "conv" else ()
    ones = (1, 1) if target.kind == "conv" else ()
    if target.adapter in ("lora", "dora"):
        shapes: Shapes = {"lora_A": (rank, target.inputs, *kernel), "lora_B": (target.outputs, rank, *ones)}
        if target.adapter == "dora":
            shapes["lora_magnitude_vector"] = (1, target.outputs, 1, 1) if kernel else (target.outputs,)
        return shapes
    if target.adapter == "loha":
        pair = {"a": (target.outputs, rank), "b": (rank, target.inputs * area)}
        return {f"hada_w{number}_{half}": shape for number in (1, 2) for half, shape in pair.items()}
    if target.adapter == "lokr":
        return _lokr(target, kernel, area, decompose_factor)
    size = oft_block(target)
    return {"oft_R": (target.inputs * area // size, size * (size - 1) // 2)}


def _lokr(target: Target, kernel: tuple[int, ...], area: int, factor: int) -> Shapes:
    in_small, in_large = factorization(target.inputs, factor)
    out_small, out_large = factorization(target.outputs, factor)
    shapes: Shapes = {"lokr_w1": (out_small, in_small)}
    if target.rank >= max(out_large, in_large) / 2:
        return {**shapes, "lokr_w2": (out_large, in_large, *kernel)}
    return {**shapes, "lokr_w2_a": (out_large, target.rank), "lokr_w2_b": (target.rank, in_large * area)}


def factorization(dimension: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is `dimension`, the smaller first: near `factor`, or near each other for -1 (LyCORIS)."""
    if factor > 0 and dimension % factor == 0:
        return min(factor, dimension // factor), max(factor, dimension // factor)
    limit = dimension if factor == -1 else factor
    small, large = 1, dimension
    for candidate in range(2, dimension + 1):
        if candidate > dimension // candidate or candidate > limit:
            break
        if dimension % candidate == 0:
            small, large = candidate, dimension // candidate
    return small, large


def oft_block(target: Target) -> int:
    """Size of a rotation's blocks: the divisor of the input's width that is nearest to the rank."""
    width = target.inputs * target.kernel**2
    return min(
        (size for size in range(2, width + 1) if width % size == 0), key=lambda size: (abs(size - target.rank), size)
    )


def skew_side(numbers: int) -> int:
    """The side of the skew-symmetric matrix that has so many numbers above its diagonal; 0: there is none."""
    side = (1 + isqrt(1 + 8 * numbers)) // 2
    return side if numbers and side * (side - 1) // 2 == numbers else 0


def count_parameters(targets: Sequence[Target], decompose_factor: int = -1) -> int:
    """Trained numbers; layers that share their first factor count it once."""
    total, shared = 0, set()
    for target in targets:
        for name, shape in adapter_shapes(target, decompose_factor).items():
            if target.tied and name == "lora_A":
                if target.kohya in shared:
                    continue
                shared.add(target.kohya)
            total += prod(shape)
    return total
