"""What families of stills make of reference pictures: pictures that the denoiser sees beside the one it makes; torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from runner.dataset.buckets import Size


@dataclass(frozen=True)
class ReferenceRule:
    """How many of them an item or a prompt may have, and the size that one of a size is resized to."""

    most: int
    size: Callable[[Size], Size]
