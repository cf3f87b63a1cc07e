"""[dataset]: pictures, captions, buckets. A source may set any of the item options again for itself."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from schemas.base import MOST_STEPS, FilePath, Name, Section, Text, key
from schemas.families.framepack import OneFrameSource
from schemas.families.references import ControlSource

Side = Annotated[int, Field(ge=8, le=16384)]
Resolution = Side | Annotated[list[Side], Field(min_length=2, max_length=2)] | None
Probability = Annotated[float, Field(ge=0, le=1)]


class ItemOptions(Section):
    """Keys that stand in [dataset] and may stand again in a source, where they win."""

    resolution: Resolution = key(None, effect="trajectory", stage="cache.latents")
    """Training size: a number for its square, or [width, height]; buckets have about this area. Unset: by family (sd15: 512)."""

    batch_size: int = key(1, effect="trajectory", stage="train", ge=1, le=4096)
    """Items in a batch. All items of a batch are of one bucket; a bucket's short last batch is kept."""

    caption_extension: str = key(
        ".txt", effect="trajectory", stage="cache.text", pattern=r"^\.[A-Za-z0-9_.-]+$", max_length=64
    )
    """A picture's caption lies beside it in a file with this extension."""

    caption_separator: str = key(",", effect="trajectory", stage="cache.text", min_length=1, max_length=200)
    """What separates the tags of a caption; several characters mean any of them (spaces beside others do not count). They are joined again by the first of them and a space, as in Kohya's tools since June 2026."""

    shuffle_caption: bool = key(False, effect="trajectory", stage="cache.text")
    """Shuffles the tags anew at each use, behind the kept ones."""

    keep_tokens: int = key(0, effect="trajectory", stage="cache.text", ge=0, le=100_000)
    """So many tags at the front stay in place and are never dropped."""

    keep_tokens_separator: Name = key("", effect="trajectory", stage="cache.text")
    """Where this stands in a caption, what is before it is kept in place; standing twice, what is after the second is a fixed tail."""

    secondary_separator: Name = key("", effect="trajectory", stage="cache.text")
    """Joins tags that move together; it becomes the first caption separator in the end."""

    enable_wildcard: bool = key(False, effect="trajectory", stage="cache.text")
    """`{a|b}` chooses one of them at each use, of several caption lines one is chosen; `{{` and `}}` stand for braces."""

    caption_prefix: Text = key("", effect="trajectory", stage="cache.text")
    """Text before every caption, with a space between."""

    caption_suffix: Text = key("", effect="trajectory", stage="cache.text")
    """Text after every caption, with a space between."""

    caption_dropout_rate: Probability = key(0.0, effect="trajectory", stage="train")
    """Share of the uses of an item at which its caption is left empty; teaches guidance. 0.05 to 0.1 is common."""

    caption_tag_dropout_rate: Probability = key(0.0, effect="trajectory", stage="cache.text")
    """Each tag behind the kept ones is left out with this probability."""

    caption_dropout_every_n_epochs: int = key(0, effect="trajectory", stage="train", ge=0, le=MOST_STEPS)
    """In each n-th epoch all captions are left empty; 0 never."""

    token_warmup_min: int = key(1, effect="trajectory", stage="cache.text", ge=1, le=100_000)
    """With token_warmup_step: how many tags behind the kept ones are used at first."""

    token_warmup_step: float = key(0.0, effect="trajectory", stage="cache.text", ge=0, le=MOST_STEPS)
    """Until this step ever more tags are used; below 1 it is a share of all steps; 0 is off."""

    flip_aug: bool = key(False, effect="trajectory", stage="cache.latents")
    """Half of the uses show the picture mirrored; both are cached."""

    color_aug: bool = key(False, effect="trajectory", stage="cache.latents")
    """A third of the uses are shown with the hue turned a little or another gamma, as in Kohya's tools. Encoded at each use unless caching.latents is set, then eight variants are cached."""

    crop_style: Literal["center", "corner", "random", "face"] = key(
        "center", effect="trajectory", stage="cache.latents"
    )
    """Where a picture is cropped: at its centre, its top left corner, at random (as random_crop), or around the face whose place its file's name tells (…_x_y_w_h, centre and size in pixels)."""

    crop_aspect: Literal["preserve", "square"] = key("preserve", effect="trajectory", stage="cache.latents")
    """preserve: into the bucket of the nearest aspect ratio. square: to a square, whatever its aspect ratio."""

    face_crop_aug_range: (
        Annotated[list[Annotated[float, Field(ge=1, le=100)]], Field(min_length=2, max_length=2)] | None
    ) = key(None, effect="trajectory", stage="cache.latents")
    """Pictures with a face (…_x_y_w_h in the file's name) are resized so that the shorter side is between so many and so many times the face's size, and cropped around it, as in Kohya's tools."""

    alpha_mask: bool = key(False, effect="trajectory", stage="cache.latents")
    """The picture's transparency is a mask of the loss: nothing is learned where it is transparent."""

    random_crop: bool = key(False, effect="trajectory", stage="cache.latents")
    """Crops at a random place instead of the centre. Encoded at each use unless caching.latents is set, then eight variants are cached."""


Count = Annotated[int, Field(ge=1, le=100_000)]


class CommonMedia(Section):
    """What the files of a folder or list are, and what lies beside them."""

    kind: Literal["image", "video"] = key("image", effect="trajectory", stage="cache.latents")
    """What the folder holds: pictures, or videos (hunyuan_video, framepack). A .jsonl list may name videos, or folders of pictures as videos, with video_path."""

    mask_path: FilePath | None = key(None, effect="none")
    """A folder of masks of the same names (grey or colour, the red channel counts): what is dark is learned less. Their content decides what is encoded again."""

    target_frames: Annotated[list[Count], Field(min_length=1, max_length=100)] | None = key(
        None, effect="trajectory", stage="cache.latents"
    )
    """Lengths of the clips that are taken out of a video, each rounded down to 4n + 1. Unset: [1]; not for frame_extraction = "full"."""

    frame_extraction: Literal["head", "chunk", "slide", "uniform", "full"] = key(
        "head", effect="trajectory", stage="cache.latents"
    )
    """Which clips: the first frames; one after the other; one each frame_stride frames; frame_sample of them evenly spread; or the whole video up to max_frames."""

    frame_stride: Count = key(1, effect="trajectory", stage="cache.latents")
    """Frames between the starts of clips of "slide"."""

    frame_sample: int = key(1, effect="trajectory", stage="cache.latents", ge=1, le=10_000)
    """How many clips "uniform" takes."""

    max_frames: Count = key(129, effect="trajectory", stage="cache.latents")
    """The longest clip of "full"."""

    source_fps: Annotated[float, Field(gt=0, le=1000)] | None = key(None, effect="trajectory", stage="cache.latents")
    """Frames a second of the videos; where it is more than the model's (hunyuan_video: 24, framepack: 30), frames are left out. Unset: all frames are used."""

    class_tokens: Text | None = key(None, effect="trajectory", stage="cache.text")
    """Caption of pictures that have no caption file. Unset: the words in the name of an `N_name` folder."""


class Media(OneFrameSource, ControlSource, CommonMedia):
    """The same with the keys that only some families have."""


class CommonSource(CommonMedia, ItemOptions):
    """Keys of a source that every family has."""

    path: FilePath = key(effect="none")
    """A folder with pictures or videos; one named `10_cat` has its repeats and class tokens in its name. A folder of such folders is taken as all of them. Or a .jsonl or .json file that lists pictures and captions as Kohya's metadata does; their paths are relative to it, or absolute."""

    repeats: int | None = key(None, effect="trajectory", stage="train", ge=1, le=1_000_000)
    """How often each picture is used in an epoch; 1 is once. Unset: the number in the folder's name, else 1."""

    regularization: bool = key(False, effect="trajectory", stage="train")
    """Regularization pictures: as many uses an epoch as training pictures have, each in its turn, through the epochs; never held out. Equal ones of equal settings count once."""

    weight: float = key(1.0, effect="trajectory", stage="train", ge=0, le=1_000_000)
    """Factor on the loss of this source's items."""


class Source(Media, CommonSource):
    """One folder of pictures or videos. Any item option of [dataset] given here wins for this source."""


class Buckets(Section):
    """Sizes that pictures of other aspect ratios are trained at (Kohya's rule)."""

    enabled: bool = key(True, effect="trajectory", stage="cache.latents")
    """false: every picture is resized and cropped to the resolution itself."""

    min_size: Side | None = key(None, effect="trajectory", stage="cache.latents")
    """Shortest side of a bucket. Unset: half of the resolution's shorter side."""

    max_size: Side | None = key(None, effect="trajectory", stage="cache.latents")
    """Longest side of a bucket. Unset: twice the resolution's longer side."""

    step: int | None = key(None, effect="trajectory", stage="cache.latents", ge=1, le=16384)
    """Sides are multiples of this. Unset: by family (sd15: 64, built-in micro: 8)."""

    no_upscale: bool = key(False, effect="trajectory", stage="cache.latents")
    """A picture smaller than the resolution keeps its own size, rounded down to the step."""


class HeldOut(Media):
    """Items that are never trained on; selection measures the loss on them. Give one of fraction, count and path.

    The other keys go with path and mean what they mean in a source. One that is not given, and every option of captions and
    pictures, is as in the first source (of this kind, without regularization); only folders of masks and control images are
    never taken over.
    """

    fraction: Annotated[float, Field(gt=0, lt=1)] | None = key(None, effect="trajectory", stage="train")
    """Share of the items, rounded up, chosen by a hash of seed and content."""

    count: int | None = key(None, effect="trajectory", stage="train", ge=1, le=MOST_STEPS)
    """Number of items, chosen by a hash of seed and content."""

    path: FilePath | None = key(None, effect="none")
    """A folder or a list of pictures or videos that are never trained on, as the path of a source. What lies in a source too, by its content, is not trained on either."""

    resolution: Resolution = key(None, effect="trajectory", stage="select")
    """Size at which they are measured. Unset: the first source's."""

    caption_extension: str | None = key(
        None, effect="trajectory", stage="select", pattern=r"^\.[A-Za-z0-9_.-]+$", max_length=64
    )
    """Their captions lie in files with this extension. Unset: the first source's."""


class Dataset(ItemOptions):
    """Where the pictures and captions are and how they are used."""

    sources: list[Source] = key(default_factory=list, effect="none", max_length=10_000)
    """The folders: [[dataset.sources]]."""

    config_file: FilePath | None = key(None, effect="none")
    """A dataset file of Kohya's tools (TOML or JSON) or musubi-tuner's (TOML), used as it is; it then owns the sources."""

    buckets: Buckets = key(default_factory=Buckets, effect="none")
    """Sizes for other aspect ratios."""

    held_out: HeldOut | None = key(None, effect="none")
    """Items kept out of training for selection."""

    follow_links: bool = key(False, effect="none")
    """Whether caption files and entries of lists may be symbolic links out of their folder. Such a link can show the text of any file, so it is refused else. Pictures in a folder may be links."""

    workers: int = key(2, effect="none", ge=0, le=64)
    """Threads that prepare batches ahead of the training step; 0 prepares them in the step itself."""

    on_bad_item: Literal["error", "skip"] = key("error", effect="none")
    """A picture that cannot be read, or has no caption: stop before anything starts, or leave it out and say so."""
