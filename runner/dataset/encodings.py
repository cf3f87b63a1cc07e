"""Which encodings an item needs: the views of its picture and the captions of its uses. Pure functions of keys and seed."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from typing import NamedTuple

from runner.dataset.buckets import Fit, View
from runner.dataset.captions import CaptionRule, render
from runner.seeding import rng

_UNUSED = random.Random(0)
"""Stands where nothing is drawn."""
VARIANTS = 8
"""How many captions or crops of a varying item are cached, where caching was asked for."""


@dataclass(frozen=True)
class ItemSettings:
    """What the items of one folder share."""

    captions: CaptionRule
    dropout_rate: float
    dropout_every_n_epochs: int
    flip: bool
    random_crop: bool
    weight: float
    regularization: bool
    batch_size: int
    facts: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        values = [value for name, value in self.__dict__.items() if name != "facts"]
        object.__setattr__(self, "facts", repr(values))


class TrainItem(NamedTuple):
    """An item as training uses it. `name` and `path` are for people and for reading; they decide nothing."""

    name: str
    path: str
    digest: str
    fit: Fit
    text: str
    repeats: int
    settings: ItemSettings

    def facts(self) -> str:
        """Everything that decides what training on this item does."""
        return f"{self.digest} {self.fit.facts} {self.repeats} {self.settings.facts} {self.text!r}"


def items_digest(items: list[TrainItem]) -> str:
    """One hash over all items, in their order."""
    hasher = hashlib.sha256()
    for item in items:
        hasher.update(f"{item.facts()}\n".encode("utf-8", "surrogatepass"))
    return hasher.hexdigest()


def view_of_use(item: TrainItem, seed: int, use: int, cached: bool) -> View:
    """The view of the use-th use of an item (counted over all epochs)."""
    view = item.fit.centre
    if item.settings.random_crop:
        view = _crop_variant(item, seed, use % VARIANTS if cached else use)
    if item.settings.flip and rng(seed, "flip", item.digest, use).random() < 0.5:
        view = view.mirrored
    return view


def _crop_variant(item: TrainItem, seed: int, variant: int) -> View:
    draw = rng(seed, "crop", item.digest, variant)
    (width, height), bucket = item.fit.resized, item.fit.bucket
    return View(
        item.fit.resized, draw.randint(0, width - bucket[0]), draw.randint(0, height - bucket[1]), bucket, False
    )


def cached_views(item: TrainItem, seed: int) -> list[View]:
    """Every view that a use can ask for when latents are cached."""
    views = [item.fit.centre]
    if item.settings.random_crop:
        views = list(dict.fromkeys(_crop_variant(item, seed, variant) for variant in range(VARIANTS)))
    if item.settings.flip:
        views += [view.mirrored for view in views]
    return views


def caption_of_use(item: TrainItem, seed: int, use: int, cached: bool, step: int = 0, total_steps: int = 0) -> str:
    """The caption of the use-th use of an item, before whole-caption dropout."""
    draw = _draw(item, seed, "caption", use % VARIANTS if cached else use)
    return render(item.text, item.settings.captions, draw, step, total_steps)


def _draw(item: TrainItem, seed: int, purpose: str, *index: int) -> random.Random:
    """The generator of a caption; where nothing varies none is seeded, which for 100,000 captions takes seconds."""
    return rng(seed, purpose, item.digest, *index) if item.settings.captions.varies else _UNUSED


def cached_captions(item: TrainItem, seed: int) -> list[str]:
    """Every caption that a use can ask for when text is cached."""
    if not item.settings.captions.varies:
        return [caption_of_use(item, seed, 0, True)]
    return list(dict.fromkeys(caption_of_use(item, seed, variant, True) for variant in range(VARIANTS)))


def evaluation_caption(item: TrainItem, seed: int) -> str:
    """The one caption under which an item's stable loss is measured."""
    rule = item.settings.captions
    steps = 1 if rule.warms_up else 0  # past the warm-up: all tags
    return render(item.text, rule, _draw(item, seed, "caption.evaluation"), steps, steps)


def is_dropped(item: TrainItem, seed: int, use: int, epoch: int) -> bool:
    """Whether the caption of this use is left empty."""
    every = item.settings.dropout_every_n_epochs
    if every > 0 and (epoch + 1) % every == 0:
        return True
    rate = item.settings.dropout_rate
    return rate > 0 and rng(seed, "caption_dropout", item.digest, use).random() < rate
