"""What families of stills make of reference pictures: pictures that the denoiser sees beside the one it makes; torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from runner.dataset.buckets import Size
from runner.dataset.parts import Found, ItemPart, ItemProblem, Piece
from runner.families.keys import takes_controls
from runner.families.spec import SourceFinding, SourceSays
from runner.model.model import Model


@dataclass(frozen=True)
class ReferenceRule:
    """How many of them an item or a prompt may have, and the size that one of a size is resized to."""

    most: int
    size: Callable[[Size], Size]


Rules = Callable[[Model], ReferenceRule | None]
"""The rule of a model; None: its denoiser sees none."""


class ReferencesItem(ItemPart):
    """The reference pictures of a still."""

    @property
    def layout(self) -> str:
        return "with " + " and ".join(f"{width}x{height}" for width, height in self.sizes)


def items(rules: Rules, model: Model, found: Found) -> list[Piece]:
    """A picture with its references. Raises `ItemProblem`."""
    rule = rules(model)
    if rule is None or not found.pictures:
        return [Piece(found.clip, None)]
    if len(found.pictures) > rule.most:
        raise ItemProblem(f"has {len(found.pictures)} control images; the model takes {rule.most}")
    sizes = tuple(rule.size(picture.size) for picture in found.pictures)
    return [Piece(found.clip, ReferencesItem(pictures=found.pictures, sizes=sizes))]


def sources(rules: Rules, model: Model, says: SourceSays) -> Iterator[SourceFinding]:
    """Reference pictures of a model that sees none."""
    if says.controls and rules(model) is None:
        message = "`control_path` belongs to models that see other pictures"
        yield SourceFinding("control_path", message, "; ".join(takes_controls()))
