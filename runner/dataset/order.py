"""The order of an epoch: which uses make which batch. A pure function of (seed, epoch), so a resume needs no state."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from runner.dataset.buckets import Size
from runner.seeding import rng


class Use(NamedTuple):
    """One use of an item in an epoch; an item with repeats = 3 has the occurrences 0, 1 and 2."""

    item: int
    occurrence: int


@dataclass(frozen=True)
class Group:
    """Uses that may share a batch: of one bucket, one batch size and one layout in time."""

    bucket: Size
    batch_size: int
    uses: tuple[Use, ...]
    layout: str = ""


def count_batches(uses: int, batch_size: int) -> int:
    return math.ceil(uses / batch_size)


def batches_per_epoch(groups: Sequence[tuple[int, int]]) -> int:
    """From (uses, batch size) of each group; the short last batch of a group is kept."""
    return sum(count_batches(uses, size) for uses, size in groups)


def steps_per_epoch(batches: int, accumulation: int) -> int:
    """Optimizer steps; the rest at the epoch's end makes a smaller step."""
    return math.ceil(batches / accumulation)


def regularization_repeats(training_uses: int, items: int) -> list[int]:
    """How often each regularization item is used, so that together they match the training uses."""
    share, rest = divmod(training_uses, items)
    return [share + (1 if index < rest else 0) for index in range(items)]


def epoch_batches(groups: Sequence[Group], seed: int, epoch: int) -> list[tuple[Use, ...]]:
    """All batches of an epoch, shuffled inside each group and among each other."""
    batches: list[tuple[Use, ...]] = []
    for index, group in enumerate(groups):
        uses = list(group.uses)
        rng(seed, "order.items", epoch, index).shuffle(uses)
        batches += [tuple(uses[start : start + group.batch_size]) for start in range(0, len(uses), group.batch_size)]
    rng(seed, "order.batches", epoch).shuffle(batches)
    return batches


def group_items(
    buckets: Sequence[Size], batch_sizes: Sequence[int], repeats: Sequence[int], items: Sequence[int],
    layouts: Sequence[str] = (),
) -> list[Group]:  # fmt: skip
    """Groups the items with these numbers; the other sequences are indexed by item."""
    found: dict[tuple[Size, int, str], list[Use]] = {}
    for item in items:
        uses = found.setdefault((buckets[item], batch_sizes[item], layouts[item] if layouts else ""), [])
        uses += [Use(item, occurrence) for occurrence in range(repeats[item])]
    return [Group(bucket, size, tuple(uses), layout) for (bucket, size, layout), uses in sorted(found.items())]


def bucket_counts(groups: Sequence[Group]) -> list[tuple[Size, str, int]]:
    """(size, layout in time, items) of each bucket; items are counted, not uses."""
    counts: Counter[tuple[Size, str]] = Counter()
    for group in groups:
        counts[group.bucket, group.layout] += len({use.item for use in group.uses})
    return sorted((size, layout, count) for (size, layout), count in counts.items())
