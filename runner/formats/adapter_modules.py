"""The modules of adapter files: what they are called and which layers are in them; torch-free.

Kohya's module may be several of our layers (a fused q, k, v) or have its halves the other way round. LoRA, DoRA and LoHa
are written for it exactly. What a naming has no form for is written as differences of the weights (LyCORIS' `diff`):
rotations, and Kronecker products of such a module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from runner.model.targets import Target

Form = Literal["kohya", "comfyui"]


@dataclass(frozen=True)
class Module:
    """One module of a file, and the layers in it that have adapters, in the order of their rows."""

    name: str
    members: tuple[Target, ...]
    alone: bool
    """The module is its one layer, as it is."""

    @property
    def kind(self) -> str:
        return self.members[0].adapter

    @property
    def outputs(self) -> int:
        return self.members[0].outputs if self.alone else self.members[0].module_outputs

    @property
    def partial(self) -> bool:
        """Whether some of its rows have no adapter."""
        return sum(member.outputs for member in self.members) < self.outputs

    @property
    def as_differences(self) -> bool:
        """Whether it is written as differences of the weights."""
        return self.kind == "oft" or (self.kind == "lokr" and not self.alone)

    @property
    def numbers(self) -> int:
        """Numbers of its whole weight."""
        return self.outputs * self.members[0].inputs * self.members[0].kernel ** 2


def file_modules(targets: Sequence[Target], form: Form) -> list[Module]:
    """The modules of a file with these adapters."""
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(_name(target, form), []).append(target)
    return [
        Module(
            name,
            tuple(sorted(group, key=lambda target: target.part)),
            not group[0].shares_module or name == group[0].separate,
        )
        for name, group in groups.items()
    ]


def _name(target: Target, form: Form) -> str:
    if target.separate and target.adapter not in ("lora", "dora"):
        return target.separate
    return target.comfyui if form == "comfyui" and target.comfyui else target.kohya


Columns = Mapping[str, tuple[int, int]]
"""Layer that is a part of a module, or it swapped → (first of its ranks, all ranks), where each part has factors of its own."""


def columns_of(targets: Sequence[Target]) -> Columns:
    """Where the ranks of these layers stand in the factors of a module of Kohya's, side by side."""
    groups: dict[str, list[Target]] = {}
    for target in targets:
        if target.shares_module:
            groups.setdefault(target.kohya, []).append(target)
    found: dict[str, tuple[int, int]] = {}
    for group in groups.values():
        total, start = sum(target.rank for target in group), 0
        for target in sorted(group, key=lambda target: target.part):
            found[target.full_name] = (start, total)
            start += target.rank
    return found


def needs_base(targets: Sequence[Target], form: Form) -> bool:
    """Whether a file of these adapters cannot be written without the weights that they are for."""
    return any(
        module.as_differences or (module.kind == "dora" and (form == "comfyui" or module.partial))
        for module in file_modules(targets, form)
    )
