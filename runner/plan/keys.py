"""The keys of the items that each stage needs from the caches; torch-free."""

from __future__ import annotations

from collections.abc import Iterable

from runner.dataset.buckets import View
from runner.dataset.encodings import TrainItem, cached_captions, cached_views, evaluation_caption, still_view


def training_views(items: Iterable[TrainItem], seed: int) -> list[tuple[TrainItem, View]]:
    """Every view that training on cached latents can ask for."""
    return [(item, view) for item in items for view in cached_views(item, seed)]


def training_texts(items: Iterable[TrainItem], seed: int) -> list[str]:
    """Every caption that training on cached text can ask for, the empty one among them."""
    return ["", *(text for item in items for text in cached_captions(item, seed))]


def evaluation_views(items: Iterable[TrainItem]) -> list[tuple[TrainItem, View]]:
    """The views that selection measures."""
    return [(item, still_view(item)) for item in items]


def evaluation_texts(items: Iterable[TrainItem], seed: int) -> list[str]:
    """The captions that selection measures under."""
    return [evaluation_caption(item, seed) for item in items]
