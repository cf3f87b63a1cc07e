"""What a family makes of a picture or a clip beside its size and captions: a part that only the family reads; torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from runner.dataset.buckets import Size
from runner.dataset.clips import Clip

if TYPE_CHECKING:
    from runner.dataset.encodings import Mask


class ItemProblem(Exception):
    """An item that its family cannot train on: what comes after its name."""


@dataclass(frozen=True, kw_only=True)
class ItemPart:
    """What an item says to its family alone. A family that knows more has a class of its own, and gives each item one:
    that a key is no longer given is seen by its fact."""

    pictures: tuple[Mask, ...] = ()
    """Pictures that are encoded with it."""
    sizes: tuple[Size, ...] = ()
    """What those are resized to; none: each is fitted as the item's own picture."""

    @property
    def frames(self) -> int | None:
        """Latent frames that are trained; None: all."""
        return None

    @property
    def layout(self) -> str | None:
        """What else than the size must be the same in a batch; None: a clip's length."""
        return None

    @property
    def place(self) -> tuple[int, ...]:
        """Which part of its clip it is: noise is drawn for it where it is measured."""
        return ()

    @property
    def order(self) -> tuple[Any, ...]:
        """What items of one picture and caption are sorted by."""
        return tuple(str(value) for value in self.facts().values())

    def facts(self) -> Mapping[str, Any]:
        """What decides how its encoding is trained on."""
        return {}

    @property
    def keys(self) -> Mapping[str, tuple[str, ...]]:
        """Name of a fact → the keys of sources that it comes from, where those are called otherwise; keys with a dot are
        paths in run.toml."""
        return {}


class Found(NamedTuple):
    """A picture or a clip, as its family is asked what it makes of it."""

    clip: Clip | None
    """None: a picture."""
    pictures: tuple[Mask, ...]
    """Its control images."""
    said: Mapping[str, Any]
    """What its source says by keys that only some families have."""


class Piece(NamedTuple):
    """Something to train on."""

    clip: Clip | None
    own: ItemPart | None


Items = Callable[[Found], Sequence[Piece]]
"""What a family makes of each picture or clip. Raises `ItemProblem`."""


def as_found(found: Found) -> Sequence[Piece]:
    """Of families that train a picture or a clip as it is."""
    return (Piece(found.clip, None),)
