"""From scanned folders to the items of a run: buckets, held-out items, repeats, groups, and what is left out and why."""

from __future__ import annotations

import heapq
import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter

from runner.dataset.buckets import Bucketing, BucketRule, Size
from runner.dataset.captions import CaptionRule
from runner.dataset.clips import Clip, ClipRule, count_kept, windows
from runner.dataset.encodings import ItemSettings, Look, TrainItem
from runner.dataset.folders import Folder
from runner.dataset.item_facts import COLUMNS, column_facts, item_facts
from runner.dataset.notes import Notes
from runner.dataset.order import Cycle, Group, batches_per_epoch, group_items, make_cycle
from runner.dataset.parts import Found, ItemProblem, Items, as_found
from runner.dataset.rates import note_making, note_rate
from runner.dataset.scan import BadItem, Item, Scan
from runner.facts import Tree
from runner.pictures import decoding
from runner.seeding import lot
from schemas.dataset import Buckets, HeldOut, ItemOptions

MOST_USES = 5_000_000
"""Of the items of an epoch, repeats included: each has a place in its order."""


class CollectProblem(Exception):
    """The items cannot make a dataset; `key` is the key of run.toml to look at."""

    def __init__(self, key: tuple[str | int, ...], message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.key = key
        self.hint = hint


@dataclass(frozen=True, kw_only=True)
class Collection:
    """The items of a run. `items` are sorted by content, so that names and places of files decide nothing."""

    items: list[TrainItem]
    held_out: list[TrainItem]
    bad: list[BadItem]
    groups: list[Group]
    batches_per_epoch: int
    uses_per_epoch: int
    cycle: Cycle | None = None
    """The turns of the regularization items."""

    @cached_property
    def facts(self) -> Tree:
        """Of the items that train."""
        return column_facts(self.items, COLUMNS)


def bucket_rule(
    options: ItemOptions, buckets: Buckets, native_size: int | list[int], step: int, musubi: bool = False
) -> BucketRule:
    """The bucket settings of a folder with the family's defaults filled in."""
    resolution = options.resolution or native_size
    size: Size = (resolution, resolution) if isinstance(resolution, int) else (resolution[0], resolution[1])
    chosen = buckets.step or step
    shortest = buckets.min_size or (1 if musubi else max(chosen, min(size) // 2 // chosen * chosen))
    longest = buckets.max_size or (2**31 if musubi else 2 * max(size))
    return BucketRule(
        resolution=size,
        enabled=buckets.enabled,
        min_size=shortest,
        max_size=longest,
        step=chosen,
        no_upscale=buckets.no_upscale,
        musubi=musubi,
    )


def collect(
    scanned: Scan,
    scanned_held_out: Scan | None,
    buckets: Buckets,
    held_out: HeldOut | None,
    native_size: int | list[int],
    bucket_step: int,
    seed: int,
    clips: ClipRule | None = None,
    notes: Notes | None = None,
    items: Items = as_found,
) -> Collection:
    """`items` is what the family makes of each picture and clip. What is not used, and why, goes to `notes`. Raises
    `CollectProblem` where nothing would be left to train on."""
    bad = list(scanned.bad)
    fitting = _Fitting(buckets, native_size, bucket_step, clips, Notes() if notes is None else notes, items)
    placed = fitting.place(scanned.items, bad)
    evaluated: list[TrainItem] = []
    if scanned_held_out is not None:
        bad += scanned_held_out.bad
        evaluated = fitting.place(scanned_held_out.items, bad)
        known = {item.digest for item in evaluated}
        fitting.notes.add(
            "~items ~lie in a source too, by content, and ~are held out: ~they ~are not trained on",
            "take ~them out of the folder of held_out.path to train on ~them",
            dict.fromkeys(item.name for item in placed if item.digest in known),
        )
        placed = [item for item in placed if item.digest not in known]
    else:
        chosen = _held_out(placed, scanned.items, held_out, seed)
        evaluated = [item for item in placed if item.digest in chosen and not item.settings.regularization]
        fitting.notes.add(
            "regularization ~pictures ~are held out too, by content, and ~are not used",
            "take ~them out of their folder",
            [item.name for item in placed if item.digest in chosen and item.settings.regularization],
        )
        placed = [item for item in placed if item.digest not in chosen]
    placed = _once(placed, fitting.notes)
    placed.sort(key=_CONTENT_ORDER)
    evaluated.sort(key=_CONTENT_ORDER)
    if not any(not item.settings.regularization for item in placed) and not bad:
        raise CollectProblem(("dataset", "sources"), "no item is left to train on", "add pictures or hold out fewer")
    _check_uses(placed)
    turning = _in_turn(placed)
    groups = group_items(
        [item.fit.bucket for item in placed],
        [item.settings.batch_size for item in placed],
        [item.repeats for item in placed],
        range(len(placed)),
        [item.layout for item in placed],
        set(turning),
    )
    uses = sum(len(group.uses) for group in groups)
    if not turning or not uses:
        batches = batches_per_epoch([(len(group.uses), group.batch_size) for group in groups])
        return Collection(
            items=placed, held_out=evaluated, bad=bad, groups=groups, batches_per_epoch=batches, uses_per_epoch=uses
        )
    groups, cycle = make_cycle(groups, turning, uses)
    if uses < len(turning):
        fitting.notes.add(
            "regularization ~items ~are used in the first epoch, the others in those after it",
            f"all have had a turn after {-(-len(turning) // uses)} epochs; more repeats of the training sources bring more an epoch",
            count=uses,
            of=len(turning),
        )
    first = Counter(use.item for _, use in cycle.uses(0))
    placed = [
        item._replace(repeats=first[n]) if item.settings.regularization else item for n, item in enumerate(placed)
    ]
    return Collection(
        items=placed,
        held_out=evaluated,
        bad=bad,
        groups=groups,
        batches_per_epoch=cycle.batches,
        uses_per_epoch=2 * uses,
        cycle=cycle,
    )


_CONTENT_ORDER = attrgetter("order")


def _check_uses(items: list[TrainItem]) -> None:
    uses = sum(item.repeats for item in items if not item.settings.regularization)
    if uses > MOST_USES:
        raise CollectProblem(
            ("dataset", "sources"),
            f"an epoch would use its items {uses:,} times; {MOST_USES:,} are the most",
            "lower repeats",
        )


class _Fitting:
    def __init__(
        self,
        buckets: Buckets,
        native_size: int | list[int],
        step: int,
        clips: ClipRule | None,
        notes: Notes,
        items: Items,
    ) -> None:
        self.items = items
        self.buckets, self.native_size, self.step, self.clips, self.notes = buckets, native_size, step, clips, notes
        self.bucketings: dict[BucketRule, Bucketing] = {}
        self.settings: dict[int, tuple[ItemSettings, Bucketing]] = {}

    def place(self, items: list[Item], bad: list[BadItem]) -> list[TrainItem]:
        """Fits each item into its bucket; one that cannot fit joins `bad`."""
        placed = []
        for item in items:
            settings, bucketing = self._of(item.folder)
            fit = bucketing.fit(item.size)
            if min(fit.bucket) < bucketing.rule.step:
                reason = f"is {item.size[0]}x{item.size[1]}, smaller than the bucket step {bucketing.rule.step}"
                bad.append(BadItem(item.folder.number, item.name, reason))
                continue
            face = _face_of(item.name) if settings.look.face_range or settings.look.crop_style == "face" else None
            own = TrainItem(
                item.name,
                item.path,
                item.digest,
                fit,
                item.text,
                item.folder.repeats,
                settings,
                face,
                item.mask,
                read=decoding(item.facts, masked=item.mask is not None and item.mask.path is None),
            )
            if item.frames:
                placed += self._clips(item, own, bad)
            else:
                placed += self._still(item, own, bad)
        return placed

    def _still(self, item: Item, own: TrainItem, bad: list[BadItem]) -> list[TrainItem]:
        """What the family makes of a picture."""
        try:
            pieces = self.items(Found(None, item.controls, item.folder.own))
        except ItemProblem as problem:
            bad.append(BadItem(item.folder.number, item.name, str(problem)))
            return []
        return [own if piece.own is None else own._replace(own=piece.own) for piece in pieces]

    def _clips(self, item: Item, own: TrainItem, bad: list[BadItem]) -> list[TrainItem]:
        """What the family makes of the clips of a video."""
        rule, options = self.clips, item.folder.clips
        assert rule is not None
        assert options is not None
        count = count_kept(item.frames, options.source_fps, rule.fps)
        found, missing = windows(count, options, rule.factor)
        kept = "" if count == item.frames else f" ({count} at {rule.fps:g} fps)"
        if not found:
            least = min(missing)
            reason = f"has {item.frames} frames{kept}, fewer than target_frames {least}"
            bad.append(BadItem(item.folder.number, item.name, reason))
            return []
        note_making(item.name, item.facts, self.notes)
        if max(length for _, length in found) > 1:
            note_rate(item.name, item.facts, options.source_fps, rule.fps, self.notes)
        if missing:
            listed = ", ".join(map(str, missing))
            self.notes.add(
                f"~videos ~are too short for target_frames {listed}",
                "shorter windows are used",
                [f"{item.name} has {item.frames} frames{kept}"],
            )
        clips: list[TrainItem] = []
        problem: ItemProblem | None = None
        for start, length in found:
            clip = Clip(start, length, options.source_fps, rule.fps)
            try:
                pieces = self.items(Found(clip, item.controls, item.folder.own))
            except ItemProblem as raised:
                problem = raised
                continue
            clips += [own._replace(clip=piece.clip, own=piece.own) for piece in pieces]
        if not clips and problem is not None:
            longest = max(length for _, length in found)
            reason = f"gives clips of {longest} frames{kept}; {problem}"
            bad.append(BadItem(item.folder.number, item.name, reason))
        return clips

    def _of(self, folder: Folder) -> tuple[ItemSettings, Bucketing]:
        found = self.settings.get(id(folder))
        if found is None:
            options = folder.options
            rule = bucket_rule(
                options, folder.buckets or self.buckets, self.native_size, self.step, self.clips is not None
            )
            if options.crop_aspect == "square":
                side = int(rule.area**0.5) // rule.step * rule.step
                rule = replace(rule, resolution=(side, side), enabled=False)
            bucketing = self.bucketings.setdefault(rule, Bucketing(rule))
            if rule.enabled and not rule.no_upscale and not bucketing.sizes:
                raise CollectProblem(
                    ("dataset", "buckets"),
                    f"no bucket has sides of {rule.min_size} to {rule.max_size} in steps of {rule.step} "
                    f"within {rule.resolution[0]}x{rule.resolution[1]} pixels",
                    "lower min_size or raise the resolution",
                )
            if min(rule.resolution) % rule.step and not rule.enabled:
                raise CollectProblem(
                    ("dataset", "resolution"),
                    f"{rule.resolution[0]}x{rule.resolution[1]} is no multiple of {rule.step}, which the model needs",
                    "turn on dataset.buckets.enabled or choose another resolution",
                )
            found = self.settings[id(folder)] = (_settings(folder), bucketing)
        return found


_FACE = re.compile(r"_(\d+)_(\d+)_(\d+)_(\d+)\.[A-Za-z]+$")


def _face_of(name: str) -> tuple[int, int, int, int] | None:
    """Centre and size of the face, from a name like `anna_320_200_96_110.png`."""
    match = _FACE.search(name)
    if match is None:
        return None
    x, y, width, height = (int(part) for part in match.groups())
    return x, y, width, height


def _settings(folder: Folder) -> ItemSettings:
    options = folder.options
    return ItemSettings(
        captions=CaptionRule.of(options, folder.whole_captions),
        dropout_rate=options.caption_dropout_rate,
        dropout_every_n_epochs=options.caption_dropout_every_n_epochs,
        flip=options.flip_aug,
        look=Look(
            options.random_crop,
            options.crop_style,
            tuple(options.face_crop_aug_range) if options.face_crop_aug_range else None,  # type: ignore[arg-type]
            options.color_aug,
        ),
        weight=folder.weight,
        regularization=folder.regularization,
        batch_size=options.batch_size,
    )


def _held_out(placed: list[TrainItem], items: list[Item], rule: HeldOut | None, seed: int) -> set[str]:
    """The contents that are held out: by the rule of run.toml, or by the shares of a dataset file, where folders of equal
    ones are taken together."""
    if rule is not None:
        return _held_out_digests(placed, rule, seed)
    chosen: set[str] = set()
    for share in sorted({item.folder.held_out or 0.0 for item in items} - {0.0}):
        own = {item.digest for item in items if item.folder.held_out == share}
        chosen |= _held_out_digests([item for item in placed if item.digest in own], HeldOut(fraction=share), seed)
    return chosen


def _held_out_digests(items: list[TrainItem], rule: HeldOut, seed: int) -> set[str]:
    """Contents (a picture that lies there twice counts once) with the lowest hash of (seed, content)."""
    candidates = {item.digest for item in items if not item.settings.regularization}
    count = rule.count if rule.count is not None else math.ceil((rule.fraction or 0) * len(candidates))
    if count >= len(candidates):
        key = "count" if rule.count is not None else "fraction"
        raise CollectProblem(
            ("dataset", "held_out", key),
            f"{count} of {len(candidates)} items would be held out; none is left to train on",
            "hold out fewer, or name a folder of its own with path",
        )
    return set(heapq.nsmallest(count, candidates, key=lambda digest: lot(seed, digest)))


def _once(items: list[TrainItem], notes: Notes) -> list[TrainItem]:
    """Regularization items that are equal in everything count once: two datasets may name the same folder."""
    found: dict[tuple[str, ...], TrainItem] = {}
    again: list[str] = []
    kept = []
    for item in items:
        if item.settings.regularization:
            facts = item_facts(item._replace(repeats=1))
            if facts in found:
                again.append(item.name)
                continue
            found[facts] = item
        kept.append(item)
    notes.add(
        "regularization ~pictures ~are named again, with the same settings, and count once", "name ~them once", again
    )
    repeated = [item.name for item in found.values() if item.repeats > 1]
    notes.add(
        "regularization ~pictures ~have repeats that do not count",
        "each gets its turn; a picture to be seen more often needs a copy with other settings",
        repeated,
        of=len(found),
    )
    return kept


def _in_turn(items: list[TrainItem]) -> list[int]:
    """The numbers of the regularization items in the order of their turns: one item of each picture before the next of any,
    and where a picture has several (of several datasets), of all of them alike."""
    variants: dict[str, list[int]] = {}
    for number, item in enumerate(items):
        if item.settings.regularization:
            variants.setdefault(item.digest, []).append(number)
    rounds = max(map(len, variants.values()), default=0)
    return [
        own[(place + round_) % len(own)]
        for round_ in range(rounds)
        for place, own in enumerate(variants.values())
        if round_ < len(own)
    ]
