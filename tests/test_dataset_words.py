"""What the plan says of a dataset in one and in many, and what it would otherwise leave unsaid."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from runner.dataset.frames import GAPS, frame_facts
from runner.dataset.notes import _FOR_ONE, Notes
from runner.errors import InvalidConfig
from tests.inprocess import prepared
from tests.support import ROOT, Place, draw_clip, draw_pictures


def notes_of(place: Place, *sources: dict[str, Any], **dataset: Any) -> list[str]:
    place.write({"dataset": {"held_out": None, "sources": list(sources), **dataset}})
    return prepared(place.file).dataset_notes.render()


def problem_of(place: Place, changes: dict[str, Any]) -> tuple[str, str | None]:
    place.write({"dataset": {"held_out": None, **changes}})
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.file)
    found = next(item for item in caught.value.diagnostics if item.severity == "error")
    return found.message.replace(str(place.folder), "$"), found.hint


def test_one_and_many() -> None:
    notes = Notes()
    notes.add("~pictures ~have no caption and ~use `cat`", "write ~them", ["a"], of=1)
    assert notes.render() == ["1 of 1 picture has no caption and uses `cat` (a); write it"]
    notes.add("~pictures ~have no caption and ~use `cat`", "write ~them", of=5)
    assert notes.render() == ["1 of 6 pictures has no caption and uses `cat` (a); write it"]
    notes.add("~pictures ~have no caption and ~use `cat`", "write ~them", ["b"], of=1)
    assert notes.render() == ["2 of 7 pictures have no caption and use `cat` (a, b); write them"]
    assert notes.as_records()[0]["message"] == "pictures have no caption and use `cat`"
    empty = Notes()
    empty.add("~pictures ~lie", "", of=3)
    assert (len(empty), empty.render()) == (0, [])


def test_every_marked_word_is_known() -> None:
    marked = {
        word
        for file in (ROOT / "runner").rglob("*.py")
        for word in re.findall(r'[" ]~([a-z]+)', file.read_text("utf-8"))
    }
    assert {"pictures", "are"} < marked
    assert marked <= set(_FOR_ONE)


def test_a_folder_that_is_a_source_of_both_kinds(family_place: Callable[..., Place]) -> None:
    place = family_place("hunyuan_video")
    mixed = place.folder / "mixed"
    draw_pictures(mixed, 1)
    draw_clip(mixed / "clip.mp4", 9)
    (mixed / "clip.txt").write_text("it moves")
    assert notes_of(place, {"path": "mixed"}, {"path": "mixed", "kind": "video", "target_frames": [5]}) == []
    assert notes_of(place, {"path": "mixed"}) == [
        '1 video lies among pictures and is not used (mixed/clip.mp4); name the folder again as a source of kind = "video"'
    ]


def test_masks_that_nothing_uses(place: Place) -> None:
    masks = place.folder / "masks"
    draw_pictures(masks, 10)
    shutil.copy(masks / "0.png", masks / "other.png")
    Image.new("RGB", (8, 8)).save(masks / "1.jpg")
    assert notes_of(place, {"path": "pics", "mask_path": "masks"}, {"path": "pics", "mask_path": "masks"}) == [
        "1 mask has the name of another with another ending, and is not used (masks/1.jpg); keep one of each name",
        "1 of 12 masks belongs to nothing that is trained on, and is not used (masks/other.png); give each the name of its picture or video",
    ]


def test_names_of_masks_in_another_unicode_form(place: Place) -> None:
    for folder, name in (("pics", "caf\u00e9"), ("masks", "cafe\u0301")):
        draw_pictures(place.folder / folder, 10)
        shutil.copy(place.folder / "pics" / "0.png", place.folder / folder / f"{name}.png")
    (place.folder / "pics" / "caf\u00e9.txt").write_text("a house")
    assert notes_of(place, {"path": "pics", "mask_path": "masks"}) == []


def test_what_lies_beside_numbered_folders(place: Place) -> None:
    draw_pictures(place.folder / "tree" / "2_cat", 2)
    (place.folder / "tree" / "stray.txt").write_text("x")
    assert notes_of(place, {"path": "tree"}) == [
        "1 file lies beside folders with a number of repeats, and is not used (tree/stray.txt); move it into one of those"
    ]
    draw_pictures(place.folder / "deep" / "2_cat" / "sub", 1)
    assert problem_of(place, {"sources": [{"path": "deep"}]})[0] == (
        "no pictures in $/deep/2_cat: it holds only the folder 'sub'"
    )


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        (
            '{"file_name": "a.png", "text": "x"}',
            "m.jsonl, line 1: it has no `image_path`",
            'a line is {"image_path": "a.png", "caption": "a cat"}; `file_name` and `text` are the names of other tools',
        ),
        (
            '{"video_path": "a.mp4", "caption": "x"}',
            "m.jsonl, line 1: it has no `image_path`",
            '`video_path` is for a source of kind = "video"; make a list for each kind',
        ),
        ('["a.png"]', "m.jsonl, line 1: it is no table", 'a line is {"image_path": "a.png", "caption": "a cat"}'),
    ],
)
def test_lines_that_name_no_picture(place: Place, line: str, message: str, hint: str) -> None:
    (place.folder / "m.jsonl").write_text(line)
    assert problem_of(place, {"sources": [{"path": "m.jsonl"}]}) == (message, hint)


def test_what_a_list_says_and_nothing_reads(place: Place) -> None:
    lines = [
        {"image_path": "pics/0.png", "caption": "x", "mask_path": "m.png", "repeats": 3},
        {"image_path": "pics/1.png", "caption": "x", "repeats": 3},
        *[{"image_path": "pics/0.png", "caption": "y"}] * 2,
    ]
    (place.folder / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert notes_of(place, {"path": "m.jsonl"}) == [
        "2 keys of m.jsonl are not read ('mask_path' of one picture, 'repeats' of 2 pictures); a caption stands under `caption` "
        "and `tags`; a source has options for all of its files",
        "1 picture is listed more than once in m.jsonl, and only the last line counts (pics/0.png); list each once",
    ]
    (place.folder / "m.jsonl").write_text(json.dumps({"image_path": "pics\\0.png", "caption": "x"}))
    assert (
        "is listed with backslashes, as Windows writes paths; write it with /"
        in problem_of(place, {"sources": [{"path": "m.jsonl"}]})[0]
    )
    assert problem_of(place, {"sources": [{"path": "m.json"}]}) == (
        "there is no list $/m.json",
        "did you mean " + str(place.folder / "m.jsonl") + "?",
    )


def test_numbers_of_frames() -> None:
    assert frame_facts([f"{n}.png" for n in range(1, 12)]) == []
    assert frame_facts([f"f_{n:03}_v2.png" for n in range(0, 60, 5)]) == []
    assert frame_facts(["1.png", "2.png", "4.png"]) == [GAPS]
    assert frame_facts(["1.jpg", "1.png", "2.jpg", "2.png"]) == [GAPS]
    assert frame_facts(["a.png", "b.png"]) == []


# --- dataset files ----------------------------------------------------------------------------------------------------

HEAD = 'caption_extension = ".txt"\n'


WITH_FILE = {"dataset": {"batch_size": None, "held_out": None, "sources": None, "config_file": "d.toml"}}


def test_each_dataset_holds_out_its_own_share(place: Place) -> None:
    draw_pictures(place.folder / "a", 4, seed=1)
    draw_pictures(place.folder / "b", 6, seed=2)
    parts = [f'[[datasets]]\n{HEAD}%s[[datasets.subsets]]\nimage_dir = "{name}"\n' for name in "ab"]
    for shares, held in ((("0.5", "0.0"), {"a": 2}), (("0.5", "0.3"), {"a": 2, "b": 2}), (("0.25", "0.25"), None)):
        (place.folder / "d.toml").write_text(
            "[general]\nvalidation_split = 0.9\n"
            + "".join(part % f"validation_split = {share}\n" for part, share in zip(parts, shares, strict=True))
        )
        place.write(WITH_FILE)
        names = [item.name.split("/")[0] for item in prepared(place.file).collection.held_out]
        if held is None:
            assert len(names) == 3, "a quarter of all ten, rounded up"
        else:
            assert {name: names.count(name) for name in set(names)} == held


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (
            '[datasets.subsets]\nimage_dir = "pics"\n',
            "`subsets` must be an array of tables",
            "write [[datasets.subsets]], in two pairs of brackets",
        ),
        (
            'image_dir = "pics"\nimage_directory = "other"\n',
            "`image_directory` and `image_dir` of one dataset name its files twice",
            "make a dataset of each",
        ),
        ('image_dir = "pics"\nnum_repeat = 2\n', "unknown key `num_repeat`", "did you mean `num_repeats`?"),
        ('image_dir = "pics"\nnum_repeats = 0\n', "`num_repeats`: must be at least 1, not 0", None),
    ],
)
def test_dataset_files_that_would_leave_something_out(place: Place, text: str, message: str, hint: str | None) -> None:
    (place.folder / "d.toml").write_text(f"[[datasets]]\n{HEAD}{text}")
    place.write(WITH_FILE)
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.file)
    found = caught.value.diagnostics[0]
    assert {found.message} & {
        message,
        message.replace("`image_directory` and `image_dir`", "`image_dir` and `image_directory`"),
    }
    assert found.hint == hint
