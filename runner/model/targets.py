"""The layers that adapters are for, and what every tool calls them; torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Adapter = Literal["lora", "dora", "loha", "lokr", "oft"]


class Alias(NamedTuple):
    """What files call a layer, without a prefix and with underscores for dots, and which rows of that module it is (as in
    `Target`)."""

    module: str
    part: tuple[int, int] = (0, 1)
    span: int = 1
    swapped: bool = False


@dataclass(frozen=True, kw_only=True)
class Target:
    """A layer that gets an adapter, or that a file may have one for: its component and diffusers name, its size, its rank and
    alpha.

    The adapter's output is scaled by alpha / rank (rslora is already in alpha).
    """

    component: str
    name: str
    kind: Literal["linear", "conv", "norm", "embedding"]
    inputs: int
    outputs: int
    kernel: int
    rank: int
    alpha: float
    kohya: str
    """The module's name in Kohya's files: `lora_unet_down_blocks_0_…`."""
    diffusers: str
    """The module's name in diffusers' files: `unet.down_blocks.0.…`."""
    adapter: Adapter = "lora"
    part: tuple[int, int] = (0, 1)
    """Which of the equal blocks of rows of Kohya's module this layer is: its q, k and v are one."""
    span: int = 1
    """How many of those blocks it takes."""
    swapped: bool = False
    """The halves of the rows stand the other way round in Kohya's module."""
    tied: bool = False
    """The layers of one module of Kohya's share their first factor."""
    aliases: tuple[Alias, ...] = field(default=(), compare=False, repr=False)
    """What files of any tool call it."""
    bias: bool = field(default=True, compare=False, repr=False)
    depth: int = field(default=0, compare=False, repr=False)
    """Frames that a convolution over time sees; 0: it is one over pictures."""
    comfyui: str = field(default="", compare=False, repr=False)
    """The module's name in ComfyUI's files, where ComfyUI does not know Kohya's."""
    separate: str = field(default="", compare=False, repr=False)
    """What files of LyCORIS' kinds call the layer by itself, where Kohya's module is several layers or swapped; empty: they
    have no name for it."""

    @property
    def full_name(self) -> str:
        return f"{self.component}.{self.name}"

    def facts(self) -> list[Any]:
        """What decides the training of its adapter."""
        left_out = {"aliases", "bias", "depth", "comfyui", "separate"} | ({"span"} if self.span == 1 else set())
        return [value for name, value in self.__dict__.items() if name not in left_out]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its weight."""
        return self.outputs, *self.row_shape

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of one row of its weight."""
        if self.kind == "norm":
            return ()
        depth = (self.depth,) if self.depth else ()
        return self.inputs, *((*depth, self.kernel, self.kernel) if self.kind == "conv" else ())

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shares_module(self) -> bool:
        """Whether Kohya's module is not just this layer as it is."""
        return self.part[1] > 1 or self.swapped

    @property
    def rows(self) -> slice:
        """Its rows in Kohya's module."""
        unit = self.outputs // self.span
        return slice(self.part[0] * unit, (self.part[0] + self.span) * unit)

    @property
    def module_outputs(self) -> int:
        """Rows of Kohya's module."""
        return self.outputs // self.span * self.part[1]
