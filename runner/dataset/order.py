"""The order of an epoch: which uses make which batch. A pure function of (seed, epoch), so a resume needs no state."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from runner.dataset.buckets import Size
from runner.seeding import rng

MOST_EPOCHS = 1000
"""After so many epochs the turns of regularization items may begin anew."""


class Use(NamedTuple):
    """One use of an item in an epoch; an item with repeats = 3 has the occurrences 0, 1 and 2. Those of regularization
    items are counted through all epochs."""

    item: int
    occurrence: int


@dataclass(frozen=True, kw_only=True)
class Group:
    """Uses that may share a batch: of one bucket, one batch size and one layout in time."""

    bucket: Size
    batch_size: int
    uses: tuple[Use, ...]
    layout: str = ""
    cycled: tuple[int, ...] = ()
    """Its regularization items, which take turns."""
    most: int = 0
    """Uses in the epoch that has most of them, where that varies."""

    @property
    def items(self) -> tuple[int, ...]:
        """Each item once."""
        return tuple(dict.fromkeys([*(use.item for use in self.uses), *self.cycled]))

    @property
    def largest_batch(self) -> int:
        return min(self.batch_size, max(len(self.uses), self.most))


@dataclass(frozen=True, kw_only=True)
class Cycle:
    """The turns of the regularization items. They go on through the epochs, so that each item has one before any has its
    next. How many of them fall into a bucket differs from epoch to epoch; every epoch has `batches` nonetheless."""

    items: tuple[int, ...]
    """In their order."""
    groups: tuple[int, ...]
    """The group of each."""
    turns: int
    """Of an epoch: as many as there are uses of training items."""
    epochs: int = 1
    """After so many the order begins anew."""
    batches: int = 0

    def uses(self, epoch: int) -> list[tuple[int, Use]]:
        """(group, use) of each turn of an epoch."""
        lap, own = divmod(epoch, self.epochs)
        before = lap * -(-self.epochs * self.turns // len(self.items))
        found = []
        for turn in range(own * self.turns, (own + 1) * self.turns):
            rounds, place = divmod(turn, len(self.items))
            found.append((self.groups[place], Use(self.items[place], before + rounds)))
        return found


def count_batches(uses: int, batch_size: int) -> int:
    return math.ceil(uses / batch_size)


def batches_per_epoch(groups: Sequence[tuple[int, int]]) -> int:
    """From (uses, batch size) of each group; the short last batch of a group is kept."""
    return sum(count_batches(uses, size) for uses, size in groups)


def steps_per_epoch(batches: int, accumulation: int) -> int:
    """Optimizer steps; the rest at the epoch's end makes a smaller step."""
    return math.ceil(batches / accumulation)


def make_cycle(groups: Sequence[Group], items: Sequence[int], turns: int) -> tuple[list[Group], Cycle]:
    """The groups with what they have at most, and the cycle of these regularization items, which are in `cycled`."""
    group_of = {item: number for number, group in enumerate(groups) for item in group.cycled}
    size = len(items)
    epochs = min(size // math.gcd(size, turns), max(MOST_EPOCHS, math.ceil(size / turns)))
    cycle = Cycle(items=tuple(items), groups=tuple(group_of[item] for item in items), turns=turns, epochs=epochs)
    places = [[place for place, number in enumerate(cycle.groups) if number == own] for own in range(len(groups))]
    twice = [[*own, *(place + size for place in own)] for own in places]
    whole, rest = divmod(turns, size)
    most, batches = [len(group.uses) for group in groups], 0
    for epoch in range(epochs):
        start = epoch * turns % size
        counts = [
            len(group.uses) + whole * len(own) + bisect_left(both, start + rest) - bisect_left(both, start)
            for group, own, both in zip(groups, places, twice, strict=True)
        ]
        most = [max(pair) for pair in zip(most, counts, strict=True)]
        batches = max(batches, sum(count_batches(n, group.batch_size) for n, group in zip(counts, groups, strict=True)))
    return [replace(group, most=n) for group, n in zip(groups, most, strict=True)], replace(cycle, batches=batches)


def epoch_uses(groups: Sequence[Group], cycle: Cycle | None, epoch: int) -> list[list[Use]]:
    """The uses of each group in an epoch."""
    uses = [list(group.uses) for group in groups]
    for group, use in cycle.uses(epoch) if cycle is not None else ():
        uses[group].append(use)
    return uses


def batch_counts(groups: Sequence[Group], cycle: Cycle | None, epoch: int) -> list[int]:
    """Batches of each group in an epoch."""
    return _split(groups, epoch_uses(groups, cycle, epoch), cycle)


def _split(groups: Sequence[Group], uses: Sequence[Sequence[Use]], cycle: Cycle | None) -> list[int]:
    """As many batches of each group as its uses need; where those are fewer in all than in another epoch, the fullest ones
    are split."""
    counts = [len(own) for own in uses]
    found = [count_batches(count, group.batch_size) for count, group in zip(counts, groups, strict=True)]
    for _ in range((cycle.batches if cycle is not None else 0) - sum(found)):
        fullest = max(range(len(found)), key=lambda index: counts[index] / max(1, found[index]))
        found[fullest] += 1
    return found


def epoch_batches(groups: Sequence[Group], seed: int, epoch: int, cycle: Cycle | None = None) -> list[tuple[Use, ...]]:
    """All batches of an epoch, shuffled inside each group and among each other."""
    batches: list[tuple[Use, ...]] = []
    every = epoch_uses(groups, cycle, epoch)
    for index, (group, uses, count) in enumerate(zip(groups, every, _split(groups, every, cycle), strict=True)):
        rng(seed, "order.items", epoch, index).shuffle(uses)
        if count == count_batches(len(uses), group.batch_size):
            starts = [*range(0, len(uses), group.batch_size), len(uses)]
        else:
            starts = [number * len(uses) // count for number in range(count + 1)]
        batches += [tuple(uses[start:end]) for start, end in pairwise(starts)]
    rng(seed, "order.batches", epoch).shuffle(batches)
    return batches


def group_items(
    buckets: Sequence[Size],
    batch_sizes: Sequence[int],
    repeats: Sequence[int],
    items: Sequence[int],
    layouts: Sequence[str] = (),
    cycled: Collection[int] = (),
) -> list[Group]:
    """Groups the items with these numbers, of which those of `cycled` take turns; the other sequences are indexed by item."""
    found: dict[tuple[Size, int, str], tuple[list[Use], list[int]]] = {}
    for item in items:
        uses, turning = found.setdefault((buckets[item], batch_sizes[item], layouts[item] if layouts else ""), ([], []))
        if item in cycled:
            turning.append(item)
        else:
            uses += [Use(item, occurrence) for occurrence in range(repeats[item])]
    return [
        Group(bucket=bucket, batch_size=size, uses=tuple(uses), layout=layout, cycled=tuple(turning))
        for (bucket, size, layout), (uses, turning) in sorted(found.items())
    ]


def bucket_counts(groups: Sequence[Group]) -> list[tuple[Size, str, int]]:
    """(size, layout in time, items) of each bucket; items are counted, not uses."""
    counts: Counter[tuple[Size, str]] = Counter()
    for group in groups:
        counts[group.bucket, group.layout] += len(group.items)
    return sorted((size, layout, count) for (size, layout), count in counts.items())
