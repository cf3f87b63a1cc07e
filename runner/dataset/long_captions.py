"""Captions that are longer than the text encoder takes, counted once for each dataset; torch-free."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

from runner.dataset.captions import fullest
from runner.dataset.encodings import TrainItem
from runner.dataset.notes import EXAMPLES, Notes
from runner.store.index import Index

Count = Callable[[list[str]], list[int]]
"""Texts → tokens of each."""


def note_long(
    items: Sequence[TrainItem],
    limit: int,
    lengths: Mapping[int, int],
    identity: str,
    count: Count,
    index: Index,
    notes: Notes,
) -> None:
    """Says how many captions are cut at `limit` tokens. `lengths`: what max_token_length may be → its limit; `identity` is the
    tokenizer's, under which the index remembers what was counted."""
    names: dict[str, str] = {}
    seen: set[str] = set()
    for item in items:
        if item.path in seen:
            continue
        seen.add(item.path)
        text, rule = item.text, item.settings.captions
        # A token is at least one byte, so most captions need no counting.
        most = len(text) + len(rule.prefix) + len(rule.suffix) + 2
        if most > limit or (not text.isascii() and 4 * most > limit):
            names.setdefault(fullest(text, rule), item.name)
    if not names:
        return
    cut, longest, places = _counted(sorted(names), limit, identity, count, index)
    larger = [length for length in sorted(lengths) if lengths[length] > limit]
    fitting = next((length for length in larger if lengths[length] >= longest), larger[-1] if larger else 0)
    texts = sorted(names)
    notes.add(
        f"~captions ~are longer than the {limit} tokens that the text encoder takes, and ~are cut (the longest has {longest:,})",
        f"max_token_length = {fitting} takes up to {lengths[fitting]}"
        if fitting
        else "write ~them shorter, what matters first",
        [names[texts[place]] for place in places],
        count=cut,
        of=len(seen),
    )


def _counted(texts: list[str], limit: int, identity: str, count: Count, index: Index) -> tuple[int, int, list[int]]:
    """(how many are longer, tokens of the longest, places of the longest ones)."""
    hasher = hashlib.sha256(f"{identity}\n{limit}\n".encode())
    for text in texts:
        hasher.update(text.encode("utf-8", "surrogatepass") + b"\0")
    key = f"tokens {hasher.hexdigest()}"
    names = [f"{key} {number}" for number in range(2 + EXAMPLES)]
    known = [index.measured(name) for name in names]
    if known[0] is None or known[1] is None:
        numbers = count(texts)
        long = sorted(
            (place for place, number in enumerate(numbers) if number > limit), key=lambda place: -numbers[place]
        )
        known = [len(long), max(numbers), *long[:EXAMPLES]]
        for name, value in zip(names, known, strict=False):
            index.put_measured(name, value or 0)
    places = [int(value) for value in known[2:] if value is not None]
    return int(known[0] or 0), int(known[1] or 0), places
