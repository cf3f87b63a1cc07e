"""What each kind of adapter makes of a weight [rows, inputs, …], in fp32; the tensors' names tell the kind.

lora (2106.09685), with a third factor for convolutions (Tucker); loha (2108.06098); lokr (2212.10650); dora (2402.09353),
whose magnitude is by row or by input; rotations of the input (peft's oft_R) and of the rows (oft_blocks of LyCORIS and
Kohya: OFT, 2306.07280, and BOFT, 2311.06243); whole differences.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from runner.networks.shapes import skew_side

Tensors = Mapping[str, Tensor]
TINY = 1e-30
"""Below every norm of a row that is not zero."""


def changed(tensors: Tensors, scale: float, weight: Tensor, multiplier: float = 1.0, terms: int = 0) -> Tensor:
    """W' in fp32, the weight with the adapter in it; with a multiplier W + multiplier · (W' - W). `terms`: of the series by
    which peft may approximate its rotations; 0: they are exact."""
    base = weight.float()
    tensors = {name: tensor.to(base.device) for name, tensor in tensors.items()}
    if "oft_blocks" in tensors:
        new = _rows_rotated(tensors, scale, base)
    elif "oft_R" in tensors:
        new = (base.flatten(1) @ rotation(tensors["oft_R"], base[0].numel(), terms).T).reshape(base.shape)
    else:
        difference = _of_weight(tensors, scale, base) if "glora_a1" in tensors else delta(tensors, scale, base.shape)
        magnitude = next((name for name in ("dora_scale", "lora_magnitude_vector") if name in tensors), None)
        if magnitude is None:
            return base + (difference if multiplier == 1 else difference * multiplier)
        by_row = magnitude == "lora_magnitude_vector" or len(tensors[magnitude]) == len(base)
        new = _decomposed(base + difference, tensors[magnitude], by_row)
    return new if multiplier == 1 else base + multiplier * (new - base)


def delta(tensors: Tensors, scale: float, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """What the kinds that add a product of factors, or a whole difference, add to a weight of this shape."""
    if "diff" in tensors or "w_norm" in tensors:
        return next(tensors[name] for name in ("diff", "w_norm") if name in tensors).reshape(shape)
    if "hada_w1_a" in tensors:
        first, second = (_product(tensors, f"hada_w{number}", f"hada_t{number}") for number in (1, 2))
        return (first * second * scale).reshape(shape)
    if "lokr_w1" in tensors or "lokr_w1_a" in tensors:
        return _kronecker(tensors, shape) * scale
    down, up = tensors["lora_A"], tensors["lora_B"].flatten(1)
    if "lora_mid" in tensors:
        down = torch.einsum("mn...,nj->mj...", tensors["lora_mid"], down.flatten(1))
    return ((up @ down.flatten(1)) * scale).reshape(shape)


def _product(tensors: Tensors, name: str, core: str) -> Tensor:
    """A factor that is the product of two, or of three: there the first has the core's rank on its first side."""
    first, second = tensors[f"{name}_a"], tensors[f"{name}_b"]
    if core not in tensors:
        return first @ second
    return torch.einsum("ij...,jn,im->mn...", tensors[core], second, first)


def _kronecker(tensors: Tensors, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The Kronecker product of the small factor and of the large one, which has the kernel's sides."""
    left = tensors["lokr_w1"].flatten(1) if "lokr_w1" in tensors else _product(tensors, "lokr_w1", "")
    right = tensors["lokr_w2"] if "lokr_w2" in tensors else _product(tensors, "lokr_w2", "lokr_t2")
    right = right.reshape(right.shape[0], -1, prod(shape[2:]))
    return torch.einsum("ac,bdk->abcdk", left, right).reshape(shape)


def _of_weight(tensors: Tensors, scale: float, base: Tensor) -> Tensor:
    """GLoRA's difference as LyCORIS and ComfyUI have it (2306.07967): a product of the weight, and a product."""
    first, second = (tensors[f"glora_a{number}"].flatten(1) for number in (1, 2))
    product = tensors["glora_b1"].flatten(1) @ tensors["glora_b2"].flatten(1)
    return (torch.einsum("oi...,ij->oj...", base, first @ second) + product.reshape(base.shape)) * scale


def _decomposed(new: Tensor, magnitude: Tensor, by_row: bool) -> Tensor:
    """The direction of `new`, the norm of each of its rows, or of each input, being `magnitude`."""
    flat = new.flatten(1) if by_row else new.transpose(0, 1).flatten(1)
    sides = (-1, *[1] * (new.dim() - 1)) if by_row else (1, -1, *[1] * (new.dim() - 2))
    norm = flat.norm(dim=1).clamp(min=TINY)
    return magnitude.reshape(sides) * new / norm.reshape(sides)


def rotation(skew: Tensor, width: int, terms: int = 0) -> Tensor:
    """The block-diagonal rotation R [width, width] of x → x R that peft's OFT applies (Cayley transform). One block serves
    for the whole width."""
    size = skew_side(skew.shape[1])
    rows, columns = torch.triu_indices(size, size, 1)
    matrix = skew.new_zeros(len(skew), size, size)
    matrix[:, rows, columns] = skew
    matrix = matrix - matrix.transpose(-2, -1)
    eye = torch.eye(size, device=skew.device).expand_as(matrix)
    if terms > 2:  # peft's series ends with half the weight of the others
        rotations = eye + 2 * (matrix + matrix @ matrix)
        power = matrix @ matrix
        for _ in range(3, terms - 1):
            power = power @ matrix
            rotations = rotations + 2 * power
        rotations = rotations + power @ matrix
    elif terms:
        rotations = eye + 2 * (terms - 1) * matrix
    else:
        rotations = torch.linalg.solve(eye + matrix, eye - matrix, left=False)
    return torch.block_diag(*rotations.expand(width // size, size, size))


def _blocks(blocks: Tensor, limit: float) -> Tensor:
    """Cayley's rotations of any square matrices' skew parts, whose common norm stays below a limit; 0: without one."""
    skew = blocks - blocks.transpose(-2, -1)
    norm = float(skew.norm())
    if limit > 0 and norm > limit:
        skew = skew * (limit / norm)
    eye = torch.eye(skew.shape[-1], device=skew.device)
    return torch.linalg.solve(eye - skew, eye + skew, left=False)


def _rows_rotated(tensors: Tensors, constraint: float, base: Tensor) -> Tensor:
    """Rotations [blocks, side, side] of neighbouring rows (OFT); or several such, one after the other, each of rows that are
    twice as far apart as before (BOFT)."""
    rotations = _blocks(tensors["oft_blocks"], constraint * len(base))
    new = base.flatten(1)
    if rotations.dim() == 3:
        new = rotations.transpose(1, 2) @ new.reshape(*rotations.shape[:2], -1)
    else:
        for number, rotation_ in enumerate(rotations):
            apart = 2**number * (rotations.shape[-1] // 2)
            pairs = new.reshape(-1, 2, apart, base[0].numel()).transpose(1, 2)
            turned = rotation_ @ pairs.reshape(*rotation_.shape[:2], -1)
            new = turned.reshape(-1, apart, 2, base[0].numel()).transpose(1, 2)
    new = new.reshape(base.shape)
    return new * tensors["rescale"].reshape(-1, *[1] * (base.dim() - 1)) if "rescale" in tensors else new
