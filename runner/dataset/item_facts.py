"""The facts of a run's items, in columns: one digest for each thing that decides what training on them does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from runner.dataset.encodings import TrainItem
from runner.facts import Fact, KnownAfter, Tree


class Column(NamedTuple):
    """One thing of each item, and the keys of [dataset] that it comes from."""

    read: Callable[[TrainItem], str]
    options: tuple[str, ...]
    noun: str | None = None
    """It is what a file of the item holds: what that is called."""


_CLIPS = ("kind", "target_frames", "frame_extraction", "frame_stride", "frame_sample", "max_frames", "source_fps")
PICTURES = {
    "picture": Column(lambda item: f"{item.digest} {item.read}", ("fraction", "count", "path"), "picture"),
    "clip": Column(lambda item: item.clip.facts if item.clip is not None else "", _CLIPS),
    "mask": Column(lambda item: item.mask.facts if item.mask is not None else "", ("alpha_mask", "mask_path"), "mask"),
    "controls": Column(
        lambda item: " ".join(picture.facts for picture in item.pictures), ("control_path",), "control image"
    ),
    "fit": Column(lambda item: f"{item.fit.facts} {item.sizes or ''}", ("resolution", "crop_aspect", "buckets")),
    "look": Column(
        lambda item: f"{item.settings.look_facts} {item.face}",
        ("flip_aug", "color_aug", "crop_style", "face_crop_aug_range", "random_crop"),
    ),
}
"""What decides the latents."""
CAPTIONS = {
    "caption": Column(lambda item: repr(item.text), ("caption_extension", "class_tokens"), "caption"),
    "tags": Column(
        lambda item: item.settings.caption_facts,
        (
            "caption_separator",
            "shuffle_caption",
            "keep_tokens",
            "keep_tokens_separator",
            "secondary_separator",
            "enable_wildcard",
            "caption_prefix",
            "caption_suffix",
            "caption_tag_dropout_rate",
            "token_warmup_min",
            "token_warmup_step",
        ),
    ),
}
"""What decides the texts."""
USES = {
    "repeats": Column(lambda item: str(item.repeats), ("repeats", "regularization")),
    "use": Column(
        lambda item: item.settings.use_facts,
        ("caption_dropout_rate", "caption_dropout_every_n_epochs", "weight", "regularization", "batch_size"),
    ),
    "part": Column(lambda item: _part(item), ()),
}
"""What decides how the encodings are trained on. Where a part comes from is said by facts of its own (`_parts`)."""
COLUMNS = PICTURES | CAPTIONS | USES
_NOTHING = "() ()"
"""Of an item that says nothing to its family alone; these words stand in the fingerprints of earlier versions."""


def column_facts(
    items: Sequence[TrainItem], columns: Mapping[str, Column], known_after: Mapping[str, str] | None = None
) -> Tree:
    """A fact for each column, the items in their order. `known_after`: column → the stage that finds it out."""
    late = known_after or {}
    found = {
        name: Fact(
            value=KnownAfter(late[name]) if name in late and items else _digest([column.read(item) for item in items]),
            origin=_origins(column.options),
            files=column.noun,
        )
        for name, column in columns.items()
    }
    return found | (_parts(items) if "part" in columns else {})


def _parts(items: Sequence[TrainItem]) -> dict[str, Fact]:
    """What the items say to their family alone, a fact of each name, with the keys that it comes from. They stand in the
    column of parts already, so they are not hashed again."""
    texts: dict[str, list[str]] = {}
    keys: dict[str, tuple[str, ...]] = {}
    for item in items:
        if item.own is not None:
            for name, value in item.own.facts().items():
                texts.setdefault(name, []).append(str(value))
                keys[name] = item.own.keys.get(name, (name,))
    return {
        f"part.{name}": Fact(value=_digest(own), origin=_origins(keys[name]), hashed=False)
        for name, own in texts.items()
    }


def _part(item: TrainItem) -> str:
    values = item.own.facts().values() if item.own is not None else ()
    return " ".join(map(str, values)) or _NOTHING


def _origins(keys: Sequence[str]) -> tuple[str, ...]:
    return (*(key if "." in key else f"dataset.**.{key}" for key in keys), "dataset.config_file")


def item_facts(item: TrainItem) -> tuple[str, ...]:
    """Everything that decides what training on an item does."""
    return tuple(column.read(item) for column in COLUMNS.values())


NOUNS = ("picture", "caption", "mask", "control image")
"""What the files of items are called, in the order of `item_digests`."""


def item_digests(item: TrainItem) -> list[str]:
    """Short digests of what the item's files hold, in the order of `NOUNS`: what the record of an apply keeps of it."""
    more = [COLUMNS[name].read(item) for name in ("mask", "controls")]
    return [item.digest, _short(item.text), *(_short(text) if text else "" for text in more)]


def _digest(texts: Sequence[str]) -> str:
    text = "\x1e".join(texts)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _short(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
