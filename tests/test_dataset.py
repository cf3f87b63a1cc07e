"""Buckets, captions and order: Kohya's rules, checked against reference data and as properties."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from runner.dataset.buckets import Bucketing, BucketRule, bucket_sizes
from runner.dataset.captions import CaptionRule, render
from runner.dataset.order import Group, Use, batches_per_epoch, epoch_batches, steps_per_epoch
from schemas.dataset import ItemOptions
from tests.inprocess import prepared
from tests.support import DATA, Place

REFERENCE = json.loads((DATA / "kohya_buckets.json").read_text())["settings"]

# --- buckets ----------------------------------------------------------------------------------------------------------


def rule_of(setting: dict[str, Any]) -> BucketRule:
    width, height = setting["resolution"]
    return BucketRule(
        resolution=(width, height),
        enabled=True,
        min_size=setting["min_size"],
        max_size=setting["max_size"],
        step=setting["step"],
        no_upscale=setting["no_upscale"],
    )


@pytest.mark.parametrize("setting", REFERENCE, ids=lambda s: f"{s['resolution']} {s['step']} {s['no_upscale']}")
def test_buckets_are_those_of_kohya(setting: dict[str, Any]) -> None:
    rule = rule_of(setting)
    if not rule.no_upscale:
        assert [list(size) for size in bucket_sizes(rule)] == setting["buckets"]
    bucketing = Bucketing(rule)
    for (width, height), bucket, resized in setting["cases"]:
        fit = bucketing.fit((width, height))
        assert [list(fit.bucket), list(fit.resized)] == [bucket, resized], (width, height)


def test_the_numbers_of_buckets_that_people_know() -> None:
    assert (
        len(
            bucket_sizes(
                BucketRule(resolution=(512, 512), enabled=True, min_size=256, max_size=1024, step=64, no_upscale=False)
            )
        )
        == 17
    )
    assert (
        len(
            bucket_sizes(
                BucketRule(
                    resolution=(1024, 1024), enabled=True, min_size=256, max_size=2048, step=64, no_upscale=False
                )
            )
        )
        == 41
    )


@given(
    width=st.integers(1, 6000),
    height=st.integers(1, 6000),
    no_upscale=st.booleans(),
    side=st.sampled_from([256, 512, 768]),
)
@settings(max_examples=300, deadline=None)
def test_a_fit_covers_its_bucket_and_crops_one_side(width: int, height: int, no_upscale: bool, side: int) -> None:
    rule = BucketRule(
        resolution=(side, side), enabled=True, min_size=128, max_size=2 * side, step=64, no_upscale=no_upscale
    )
    fit = Bucketing(rule).fit((width, height))
    left, top = fit.centre.left, fit.centre.top
    assert fit.resized[0] >= fit.bucket[0]
    assert fit.resized[1] >= fit.bucket[1]
    assert left >= 0
    assert top >= 0
    assert fit.bucket[0] * fit.bucket[1] <= rule.area
    assert all(length % 64 == 0 for length in fit.bucket)
    if no_upscale:
        assert fit.resized[0] <= width + 1
        assert fit.resized[1] <= height + 1


# --- captions ---------------------------------------------------------------------------------------------------------


def rule(**options: Any) -> CaptionRule:
    return CaptionRule.of(ItemOptions(**options))


def one(text: str, step: int = 0, total: int = 0, seed: int = 0, **options: Any) -> str:
    return render(text, rule(**options), random.Random(seed), step, total)


def test_a_plain_caption_is_its_first_line_unchanged() -> None:
    assert one("a cat,  on a mat\nmore\n") == "a cat,  on a mat"
    assert one("\n\n  a cat  \n") == "a cat"
    assert one("") == ""


def test_prefix_and_suffix() -> None:
    assert one("a cat", caption_prefix="photo of", caption_suffix="at night") == "photo of a cat at night"


def test_wildcards() -> None:
    drawn = {one("a {red|blue|{{x}}} cat", seed=seed, enable_wildcard=True) for seed in range(40)}
    assert drawn == {"a red cat", "a blue cat", "a {x} cat"}
    assert {one("first\nsecond", seed=seed, enable_wildcard=True) for seed in range(20)} == {"first", "second"}
    assert one("a {red|blue} cat") == "a {red|blue} cat"


def test_kept_tags_stay_and_the_rest_is_shuffled() -> None:
    text = "a, b, c, d, e, f"
    drawn = [one(text, seed=seed, shuffle_caption=True, keep_tokens=2) for seed in range(30)]
    assert all(caption.startswith("a, b, ") for caption in drawn)
    assert all(sorted(caption.split(", ")) == list("abcdef") for caption in drawn)
    assert len(set(drawn)) > 10


def test_separators() -> None:
    assert one("a, b ||| c, d ||| e", keep_tokens_separator="|||") == "a, b, c, d, e"
    heads = {
        one("a, b ||| c, d, g ||| e", seed=s, keep_tokens_separator="|||", shuffle_caption=True) for s in range(30)
    }
    assert all(caption.startswith("a, b, ") and caption.endswith(", e") for caption in heads)
    assert len(heads) == 6
    assert one("a;;b, c", secondary_separator=";;", shuffle_caption=True, keep_tokens=2) == "a,b, c"
    split = one("one. two, three", caption_separator=",.", shuffle_caption=True)
    assert sorted(split.split(", ")) == ["one", "three", "two"]


def test_tag_dropout_spares_the_kept() -> None:
    counts = Counter(
        len(one("a, b, c, d, e", seed=s, caption_tag_dropout_rate=0.5, keep_tokens=1).split(", ")) for s in range(300)
    )
    assert min(counts) == 1
    assert 2.5 < sum(size * times for size, times in counts.items()) / 300 < 3.5
    assert all(one("a, b", seed=s, caption_tag_dropout_rate=1.0, keep_tokens=1) == "a" for s in range(5))


def test_the_warm_up_truncates_before_shuffling() -> None:
    text = "k, " + ", ".join(f"t{index}" for index in range(10))
    options = {"keep_tokens": 1, "token_warmup_min": 1, "token_warmup_step": 100.0, "shuffle_caption": True}
    assert one(text, step=0, total=500, **options) == "k, t0"
    middle = one(text, step=50, total=500, **options).split(", ")
    assert set(middle) == {"k", *(f"t{index}" for index in range(5))}
    assert len(one(text, step=100, total=500, **options).split(", ")) == 11
    assert one(text, step=0, total=500, **{**options, "token_warmup_step": 0.2}) == "k, t0"
    assert len(one(text, step=100, total=500, **{**options, "token_warmup_step": 0.2}).split(", ")) == 11


@given(
    tags=st.lists(st.text("abcxyz 0123", min_size=1, max_size=6).map(str.strip).filter(bool), min_size=1, max_size=12),
    keep=st.integers(0, 4),
    shuffle=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_shuffling_loses_nothing_and_depends_on_the_seed_alone(
    tags: list[str], keep: int, shuffle: bool, seed: int
) -> None:
    text = ",".join(tags)
    options = {"shuffle_caption": shuffle, "keep_tokens": keep}
    caption = one(text, seed=seed, **options)
    assert caption == one(text, seed=seed, **options)
    if shuffle:
        assert sorted(caption.split(", ")) == sorted(tags)
        assert caption.split(", ")[:keep] == tags[:keep]
    else:
        assert caption == text


# --- order ------------------------------------------------------------------------------------------------------------


def test_476_pictures_ten_times_at_batch_six_are_794_steps() -> None:
    assert batches_per_epoch([(4760, 6)]) == 794
    assert steps_per_epoch(794, 1) == 794
    assert steps_per_epoch(10, 4) == 3


@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 5)), min_size=1, max_size=4), epoch=st.integers(0, 3)
)
@settings(max_examples=100, deadline=None)
def test_an_epoch_uses_everything_once_in_batches_of_one_group(sizes: list[tuple[int, int]], epoch: int) -> None:
    groups, first = [], 0
    for number, (count, batch) in enumerate(sizes):
        groups.append(
            Group(
                bucket=(64 + number, 64), batch_size=batch, uses=tuple(Use(first + index, 0) for index in range(count))
            )
        )
        first += count
    batches = epoch_batches(groups, 7, epoch)
    assert len(batches) == batches_per_epoch(sizes)
    assert sorted(use.item for batch in batches for use in batch) == list(range(first))
    for batch in batches:
        own = [group for group in groups if batch[0] in group.uses]
        assert len(batch) <= own[0].batch_size
        assert all(use in own[0].uses for use in batch)
    assert batches == epoch_batches(groups, 7, epoch)


# --- items ------------------------------------------------------------------------------------------------------------


def test_folders_with_repeats_class_tokens_and_nested_parents(place: Place) -> None:
    """Kohya's train_data_dir: `N_name` folders below one path; a picture without a caption file takes the class tokens."""
    for name in ("3_cat", "2_dog"):
        (place.folder / "data" / name).mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (32, 32), (index * 50, 10, 90)).save(place.folder / "data" / name / f"{name}{index}.png")
    (place.folder / "data" / "3_cat" / "3_cat0.txt").write_text("﻿a cat, sitting", encoding="utf-8")
    place.write({"dataset": {"held_out": None, "sources": [{"path": "data"}]}})
    run = prepared(place.file)
    found = sorted((item.name, item.repeats, item.text) for item in run.collection.items)
    assert found == [
        ("2_dog/2_dog0.png", 2, "dog"),
        ("2_dog/2_dog1.png", 2, "dog"),
        ("3_cat/3_cat0.png", 3, "a cat, sitting"),
        ("3_cat/3_cat1.png", 3, "cat"),
    ]
    assert run.length.batches_per_epoch == 5


def test_held_out_items_are_chosen_by_content_and_rounded_up(place: Place) -> None:
    place.write({"dataset": {"held_out": {"count": None, "fraction": 0.21}}})
    first = {item.digest for item in prepared(place.file).collection.held_out}
    assert len(first) == 3
    for file in sorted((place.folder / "pics").iterdir()):
        file.rename(file.with_name(f"renamed_{file.name}"))
    again = prepared(place.file)
    assert {item.digest for item in again.collection.held_out} == first
    assert len(again.collection.items) == 7
    assert {item.digest for item in prepared(place.file, "run.seed=1").collection.held_out} != first


def test_a_turned_photo_is_seen_upright(place: Place) -> None:
    from runner.data.images import PictureRequest

    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (64, 32), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 0, 32, 32))
    picture.save(place.folder / "pics" / "turned.jpg", exif=exif, quality=95)
    (place.folder / "pics" / "turned.txt").write_text("turned")
    run = prepared(place.file, "dataset.buckets.max_size=64")
    item = next(item for item in (*run.collection.items, *run.collection.held_out) if "turned" in item.name)
    assert item.fit.bucket[1] > item.fit.bucket[0]
    pixels = PictureRequest(item.path, item.digest, item.fit.centre).pixels()
    assert pixels[2, 2, 2] > 0.8, "blue is above after the turn"
    assert pixels[0, -3, 2] > 0.8, "red below"


def test_pictures_of_any_mode_are_read(tmp_path: Path) -> None:
    """Converted to RGB; what is transparent stands on white (`alpha_mask` is another matter)."""
    import hashlib

    from runner.data.images import PictureRequest
    from runner.dataset.buckets import View

    for mode in ("RGBA", "LA", "L", "P", "CMYK", "I;16", "1"):
        picture = Image.new(mode, (16, 16))
        file = tmp_path / f"{mode.replace(';', '')}.{'tiff' if mode == 'CMYK' else 'png'}"
        picture.save(file)
        request = PictureRequest(
            str(file),
            hashlib.sha256(file.read_bytes()).hexdigest(),
            View(resized=(16, 16), left=0, top=0, bucket=(16, 16), flip=False),
        )
        pixels = request.pixels()
        assert pixels.shape == (3, 16, 16)
        assert float(pixels.mean()) == pytest.approx(1.0 if mode in ("CMYK", "RGBA", "LA") else -1.0)
