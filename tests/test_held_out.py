"""held_out.path: everything that a source takes; what it leaves open is as in the first source."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from runner.config.load import load
from runner.errors import InvalidConfig
from tests.inprocess import prepared
from tests.support import Place, draw_clips, draw_pictures

CLIPS = {"path": "clips", "kind": "video", "target_frames": [5, 9], "frame_extraction": "chunk", "resolution": [32, 32]}
Make = Callable[..., Place]


def held_out(place: Place, rule: dict[str, Any], **dataset: Any) -> Any:
    return prepared(place.write({"dataset": {"held_out": {"count": None, **rule}, **dataset}})).collection.held_out


def test_what_lies_in_a_source_too_is_said(place: Place) -> None:
    draw_pictures(place.folder / "apart", 2, seed=77)
    for name in ("3", "5"):
        (place.folder / "apart" / f"copy{name}.png").write_bytes((place.folder / "pics" / f"{name}.png").read_bytes())
        (place.folder / "apart" / f"copy{name}.txt").write_text("a copy")
    file = place.write({"dataset": {"held_out": {"count": None, "path": "apart"}}})
    run = prepared(file)
    assert (len(run.collection.items), len(run.collection.held_out)) == (8, 4)
    assert run.dataset_notes.render() == [
        "2 items lie in a source too, by content, and are held out: they are not trained on (pics/3.png, pics/5.png); "
        "take them out of the folder of held_out.path to train on them"
    ]


def test_clips_as_in_the_source(family_place: Make) -> None:
    place = family_place("hunyuan_video")
    draw_clips(place.folder / "clips", [21, 25])
    draw_clips(place.folder / "apart", [17])
    found = held_out(place, {"path": "apart"}, sources=[CLIPS])
    assert sorted(tuple(item.clip)[:2] for item in found) == [(0, 5), (0, 9), (5, 5), (10, 5)]
    found = held_out(place, {"path": "apart", "target_frames": [13]}, sources=[CLIPS])
    assert [tuple(item.clip)[:2] for item in found] == [(0, 13)], "a key of its own wins"
    found = held_out(place, {"path": "pics", "kind": "image"}, sources=[CLIPS, {"path": "clips", "kind": "video"}])
    assert {item.clip for item in found} == {None}
    found = held_out(place, {"path": "apart", "kind": "video", "frame_extraction": "full"}, sources=[{"path": "pics"}])
    assert [tuple(item.clip)[:2] for item in found] == [(0, 17)]


def test_a_list_of_clips(family_place: Make) -> None:
    place = family_place("hunyuan_video")
    draw_clips(place.folder / "clips", [21, 25])
    line = {"video_path": str(place.folder / "clips" / "1.mp4"), "caption": "held"}
    (place.folder / "apart.jsonl").write_text(json.dumps(line))
    found = held_out(place, {"path": "apart.jsonl"}, sources=[CLIPS])
    assert {item.text for item in found} == {"held"}
    assert len(found) > 1


def test_one_frame_with_controls_and_keys_of_its_own(family_place: Make) -> None:
    place = family_place("framepack")
    draw_pictures(place.folder / "apart", 2, seed=5)
    source = {"path": "pics", "control_path": "pics", "one_frame": {"target_index": 3, "no_post": True}}
    found = held_out(place, {"path": "apart", "control_path": "apart"}, sources=[source])
    assert [(item.own.one_frame.target_index, len(item.pictures)) for item in found] == [(3, 1)] * 2
    found = held_out(
        place, {"path": "apart", "control_path": "apart", "one_frame": {"target_index": 1}}, sources=[source]
    )
    assert [item.own.one_frame.target_index for item in found] == [1] * 2
    with pytest.raises(InvalidConfig, match="one-frame training needs control images, and this source has none"):
        held_out(place, {"path": "apart"}, sources=[source])


def test_options_masks_and_words(place: Place) -> None:
    draw_pictures(place.folder / "apart", 2, seed=5)
    draw_pictures(place.folder / "masks", 2, seed=6)
    for file in (place.folder / "apart").glob("*.txt"):
        file.rename(file.with_suffix(".caption"))
    source = {"path": "pics", "resolution": 16, "caption_prefix": "by me", "class_tokens": "thing"}
    with_words = held_out(
        place, {"path": "apart", "caption_extension": ".caption", "mask_path": "masks"}, sources=[source]
    )
    assert {item.fit.bucket for item in with_words} == {(16, 16)}
    assert {item.settings.captions.prefix for item in with_words} == {"by me"}
    assert all(item.mask is not None for item in with_words)
    without = held_out(place, {"path": "apart", "resolution": 24}, sources=[source], buckets={"step": 8})
    assert {(item.text, item.fit.bucket) for item in without} == {("thing", (24, 24))}


def test_a_dataset_files_settings(place: Place) -> None:
    draw_pictures(place.folder / "apart", 2, seed=5)
    text = '[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 16\nbucket_reso_steps = 8\nvalidation_split = 0.2\n'
    (place.folder / "d.toml").write_text(text + '[[datasets.subsets]]\nimage_dir = "pics"\n')
    changes = {
        "batch_size": None,
        "sources": None,
        "config_file": "d.toml",
        "held_out": {"count": None, "path": "apart"},
    }
    run = prepared(place.write({"dataset": changes}))
    assert {item.fit.bucket for item in run.collection.held_out} == {(16, 16)}
    assert [warning.message for warning in run.warnings if "split" in warning.message] == [
        "`validation_split` in d.toml gives way to [dataset.held_out]"
    ]


def test_keys_that_need_a_path(place: Place) -> None:
    file = place.write({"dataset": {"held_out": {"count": 2, "kind": "image", "one_frame": {"no_post": True}}}})
    assert [finding.message for finding in load(file).diagnostics] == [
        "`kind` of [dataset.held_out] goes with `path`",
        "`one_frame` of [dataset.held_out] goes with `path`",
    ]
