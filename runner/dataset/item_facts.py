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
        lambda item: " ".join(control.facts for control in item.controls), ("control_path",), "control image"
    ),
    "fit": Column(lambda item: f"{item.fit.facts} {item.references or ''}", ("resolution", "crop_aspect", "buckets")),
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
    "part": Column(lambda item: f"{tuple(item.section or ())} {tuple(item.one_frame or ())}", ("one_frame",)),
}
"""What decides how the encodings are trained on."""
COLUMNS = PICTURES | CAPTIONS | USES
_MORE = {"part": ("model.variant", "model.latent_window_size")}
"""Origins outside of [dataset]."""


def column_facts(
    items: Sequence[TrainItem], columns: Mapping[str, Column], known_after: Mapping[str, str] | None = None
) -> Tree:
    """A fact for each column, the items in their order. `known_after`: column → the stage that finds it out."""
    late = known_after or {}
    return {
        name: Fact(
            value=KnownAfter(late[name]) if name in late and items else _digest(items, column),
            origin=(
                *(f"dataset.**.{option}" for option in column.options),
                "dataset.config_file",
                *_MORE.get(name, ()),
            ),
            files=column.noun,
        )
        for name, column in columns.items()
    }


def item_facts(item: TrainItem) -> tuple[str, ...]:
    """Everything that decides what training on an item does."""
    return tuple(column.read(item) for column in COLUMNS.values())


NOUNS = ("picture", "caption", "mask", "control image")
"""What the files of items are called, in the order of `item_digests`."""


def item_digests(item: TrainItem) -> list[str]:
    """Short digests of what the item's files hold, in the order of `NOUNS`: what the record of an apply keeps of it."""
    more = [COLUMNS[name].read(item) for name in ("mask", "controls")]
    return [item.digest, _short(item.text), *(_short(text) if text else "" for text in more)]


def _digest(items: Sequence[TrainItem], column: Column) -> str:
    read = column.read
    text = "\x1e".join([read(item) for item in items])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _short(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
