"""Which encodings an item needs: the views of its picture and the captions of its uses. Pure functions of keys and seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from runner.dataset.buckets import Fit, Size, View
from runner.dataset.captions import CaptionRule, render
from runner.dataset.clips import Clip
from runner.dataset.parts import ItemPart
from runner.seeding import rng

_UNUSED = random.Random(0)
"""Stands where nothing is drawn."""
VARIANTS = 8
"""How many captions or crops of a varying item are cached, where caching was asked for."""


@dataclass(frozen=True)
class Look:
    """How pictures are cropped and coloured."""

    random_crop: bool = False
    crop_style: str = "center"
    face_range: tuple[float, float] | None = None
    color_aug: bool = False

    @property
    def is_random(self) -> bool:
        return self.random_crop or self.crop_style == "random"

    @property
    def varies(self) -> bool:
        """Whether two uses of one picture may look different, beside being mirrored."""
        spread = self.face_range is not None and self.face_range[0] != self.face_range[1]
        return self.is_random or self.color_aug or spread


class Mask(NamedTuple):
    """The mask of a picture's loss: its own transparency, or a file with its digest."""

    path: str | None
    digest: str
    read: str = ""
    """How it was decoded, where that is not plain (`runner.pictures.decoding`)."""
    size: Size = (0, 0)
    """Of a picture that is encoded with another one."""

    @property
    def facts(self) -> str:
        return "alpha" if self.path is None else f"{self.digest} {self.read}".rstrip()


@dataclass(frozen=True, kw_only=True)
class ItemSettings:
    """What the items of one folder share."""

    captions: CaptionRule
    dropout_rate: float
    dropout_every_n_epochs: int
    flip: bool
    look: Look
    weight: float
    regularization: bool
    batch_size: int
    facts: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        values = [value for name, value in self.__dict__.items() if name != "facts"]
        object.__setattr__(self, "facts", repr(values))

    @cached_property
    def look_facts(self) -> str:
        """What decides how pictures are shown."""
        return repr((self.flip, self.look))

    @cached_property
    def caption_facts(self) -> str:
        """What decides the captions of its texts."""
        return repr(self.captions)

    @cached_property
    def use_facts(self) -> str:
        """What decides how encodings are trained on."""
        return repr((self.dropout_rate, self.dropout_every_n_epochs, self.weight, self.regularization, self.batch_size))


class TrainItem(NamedTuple):
    """An item as training uses it. `name` and `path` are for people and for reading; they decide nothing."""

    name: str
    path: str
    digest: str
    fit: Fit
    text: str
    repeats: int
    settings: ItemSettings
    face: tuple[int, int, int, int] | None = None
    """Centre and size of the face in the picture, where the file's name tells it and it is asked for."""
    mask: Mask | None = None
    clip: Clip | None = None
    """Which frames of a video; None: a picture."""
    own: ItemPart | None = None
    """What it says to its family alone."""
    read: str = ""
    """How the picture or video was decoded, where that is not plain (`runner.pictures.decoding`)."""

    @property
    def pictures(self) -> tuple[Mask, ...]:
        """Pictures that are encoded with it."""
        return self.own.pictures if self.own is not None else ()

    @property
    def sizes(self) -> tuple[Size, ...]:
        """What those are resized to, where it is not as its own picture."""
        return self.own.sizes if self.own is not None else ()

    @property
    def _media(self) -> str:
        sizes = (f"{width}x{height}" for width, height in self.sizes)
        return " ".join([self.clip.facts if self.clip else "", *(picture.facts for picture in self.pictures), *sizes])

    @property
    def picture(self) -> str:
        """Identity of the picture or clip, its mask and what is encoded with it, for the keys of encodings."""
        mask = f" {self.mask.facts}" if self.mask is not None else ""
        media = f" {self._media}" if self.clip is not None or self.pictures else ""
        read = f" {self.read}" if self.read else ""
        return f"{self.digest}{mask}{media}{read}"

    @property
    def identity(self) -> tuple[str | int, ...]:
        """What its noise is drawn for when it is measured: the picture, or the part of the video."""
        clip = () if self.clip is None else (self.clip.facts,)
        return self.digest, *clip, *(() if self.own is None else self.own.place)

    @property
    def order(self) -> tuple[Any, ...]:
        """What items are sorted by: their content, never their names or places."""
        return self.digest, self.text, self.settings.facts, self.clip or (), () if self.own is None else self.own.order

    def latent_frames(self, factor: int) -> int:
        """Latent frames that are trained."""
        own = self.own.frames if self.own is not None else None
        if own is not None:
            return own
        return (self.clip.length - 1) // factor + 1 if self.clip is not None else 1

    @property
    def layout(self) -> str:
        """What else than the size must be the same in a batch."""
        own = self.own.layout if self.own is not None else None
        if own is not None:
            return own
        if self.clip is None:
            return ""
        return f"{self.clip.length} frame{'s' * (self.clip.length != 1)}"


def view_of_use(item: TrainItem, seed: int, use: int, cached: bool) -> View:
    """The view of the use-th use of an item (counted over all epochs)."""
    view = still_view(item)
    if item.settings.look.varies:
        view = _variant(item, seed, use % VARIANTS if cached else use)
    if item.settings.flip and rng(seed, "flip", item.digest, use).random() < 0.5:
        view = view.mirrored
    return view


def still_view(item: TrainItem) -> View:
    """The view without chance: what is measured, and what is trained where nothing varies."""
    look = item.settings.look
    if item.face is not None and (look.face_range is not None or look.crop_style == "face"):
        return _around_face(item, None)
    if look.crop_style == "corner":
        return replace(item.fit.centre, left=0, top=0)
    return item.fit.centre


def _variant(item: TrainItem, seed: int, variant: int) -> View:
    look, draw = item.settings.look, rng(seed, "crop", item.digest, variant)
    if item.face is not None and look.face_range is not None:
        view = _around_face(item, draw)
    elif look.is_random:
        (width, height), bucket = item.fit.resized, item.fit.bucket
        left, top = draw.randint(0, width - bucket[0]), draw.randint(0, height - bucket[1])
        view = replace(item.fit.centre, left=left, top=top)
    else:
        view = still_view(item)
    return _coloured(view, rng(seed, "colour", item.digest, variant)) if look.color_aug else view


def _coloured(view: View, draw: random.Random) -> View:
    """sd-scripts' colour augmentation: of a third of the uses the hue or the gamma is changed slightly."""
    if draw.random() >= 0.33:
        return view
    if draw.random() < 0.5:
        return replace(view, hue=draw.randint(-16, 16))
    return replace(view, gamma=draw.randint(95, 105))


def _around_face(item: TrainItem, draw: random.Random | None) -> View:
    """Resized by the face's size and cropped around it, as sd-scripts' `crop_target`; without `draw` in the middle of
    what is allowed."""
    assert item.face is not None
    (width, height), bucket = item.fit.original, item.fit.bucket
    face_x, face_y, face_w, face_h = item.face
    smallest = max(item.fit.resized[0] / width, item.fit.resized[1] / height)
    scale = smallest
    span = item.settings.look.face_range
    size = max(face_w, face_h, 1)
    if span is not None:
        low = max(smallest, min(1.0, min(bucket) / (size * max(span))))
        high = max(low, min(1.0, min(bucket) / (size * min(span))))
        scale = (low + high) / 2 if draw is None else draw.uniform(low, high)
    resized = (max(bucket[0], int(width * scale + 0.5)), max(bucket[1], int(height * scale + 0.5)))
    places = []
    for length, target, middle in ((resized[0], bucket[0], face_x), (resized[1], bucket[1], face_y)):
        start = int(middle * scale + 0.5) - target // 2
        if draw is not None:
            if item.settings.look.is_random:
                reach = max(length - int(middle * scale), int(middle * scale), 0)
                start += draw.randint(0, reach) + draw.randint(0, reach) - reach
            else:
                start += draw.randint(-int(size * scale) // 20, int(size * scale) // 20)
        places.append(max(0, min(start, length - target)))
    return replace(item.fit.centre, resized=resized, left=places[0], top=places[1])


def cached_views(item: TrainItem, seed: int) -> list[View]:
    """Every view that a use can ask for when latents are cached."""
    views = [still_view(item)]
    if item.settings.look.varies:
        views = list(dict.fromkeys(_variant(item, seed, variant) for variant in range(VARIANTS)))
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
