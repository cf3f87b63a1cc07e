"""Layers as data: one description serves exact parameter counts, adapter targets, predicted memory, the strict check of
checkpoint headers, and the renaming between the diffusers and the original layout. Torch-free.

Tests compare every description with the classes of diffusers and transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

Shape = tuple[int, ...]
Config = Mapping[str, Any]
Layers = Callable[[Config], "list[Layer]"]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a tensor of a module comes from: a key, or some rows of it.

    `part` of `parts`: which of the equal blocks of rows (a fused q, k, v), and `span`: how many of them. `swapped`: the halves of the rows change
    places (shift, scale → scale, shift). `transposed`: OpenCLIP's projection.
    """

    key: str
    part: int = 0
    parts: int = 1
    span: int = 1
    swapped: bool = False
    transposed: bool = False
    identity: bool = False
    """The tensor is in no file; it is the identity matrix."""
    file: int = 0
    """Which of the component's files."""
    scale: str = ""
    """The key of what its numbers are multiplied with: one number, or one for each row."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer with weights. `name` is its diffusers name, `original` its name in the original layout.

    `level` counts the halvings of the resolution above it.
    """

    name: str
    original: str
    kind: Literal["conv", "linear", "norm", "embedding", "table"]
    """A table is a stored tensor that does not train (positions); it has no name below its layer."""
    inputs: int
    outputs: int
    kernel: int = 1
    bias: bool = True
    level: int = 0
    original_is_conv: bool = False
    """An attention projection that is a linear layer in diffusers and a 1x1 convolution in the LDM layout."""
    suffix: str = ".{}"
    """What the original name of a parameter adds to the layer's: "" where it is the parameter itself."""
    part: tuple[int, int] = (0, 1)
    """Which of the equal blocks of rows of the original tensor it is, and of how many."""
    span: int = 1
    """How many of those blocks it takes."""
    swapped: bool = False
    transposed: bool = False
    identity: bool = False
    """A file without it means the identity."""
    depth: int = 0
    """Frames that a convolution over time sees; 0: it is one over pictures."""

    def parameters(self) -> Iterator[tuple[str, Shape]]:
        """(name below the layer, shape) of each parameter, in diffusers' layout."""
        if self.kind == "conv":
            frames = (self.depth,) if self.depth else ()
            yield "weight", (self.outputs, self.inputs, *frames, self.kernel, self.kernel)
        elif self.kind == "norm":
            yield "weight", (self.outputs,)
        elif self.kind == "table":
            yield "", (1, self.outputs, self.inputs)
        else:
            yield "weight", (self.outputs, self.inputs)
        if self.bias and self.kind not in ("embedding", "table"):
            yield "bias", (self.outputs,)

    def key(self, parameter: str) -> str:
        """The module's key of a parameter."""
        return f"{self.name}.{parameter}" if parameter else self.name

    def origin(self, parameter: str, prefix: str) -> Origin:
        """Where the parameter is in a file of the original layout."""
        key = prefix + self.original + self.suffix.format(parameter)
        return Origin(
            key=key,
            part=self.part[0],
            parts=self.part[1],
            span=self.span,
            swapped=self.swapped,
            transposed=self.transposed,
        )

    def original_shape(self, parameter: str, shape: Shape) -> Shape:
        """The shape of the whole tensor in a file of the original layout."""
        if self.transposed:
            return shape[::-1]
        fused = (shape[0] // self.span * self.part[1], *shape[1:]) if self.kind != "table" else shape
        return (*fused, 1, 1) if self.original_is_conv and parameter == "weight" else fused


def parameters(layers: Sequence[Layer]) -> dict[str, Shape]:
    """The module's key → shape."""
    return {layer.key(name): shape for layer in layers for name, shape in layer.parameters()}


def original_parameters(layers: Sequence[Layer], prefix: str) -> dict[str, Shape]:
    """Key in the original layout → shape there."""
    return {
        layer.origin(name, prefix).key: layer.original_shape(name, shape)
        for layer in layers
        for name, shape in layer.parameters()
    }


def origins(layers: Sequence[Layer], prefix: str) -> dict[str, Origin]:
    """The module's key → where it is in a file of the original layout."""
    return {layer.key(name): layer.origin(name, prefix) for layer in layers for name, _ in layer.parameters()}


def count(layers: Sequence[Layer]) -> int:
    """Number of parameters."""
    return sum(prod(shape) for layer in layers if layer.kind != "table" for _, shape in layer.parameters())


def per_block(value: Any, blocks: int) -> list[int]:
    """A setting that may be one number for all blocks or a list."""
    return list(value) if isinstance(value, (list, tuple)) else [value] * blocks
