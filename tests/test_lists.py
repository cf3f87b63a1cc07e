"""Lists of pictures (.json, .jsonl): where their files may lie, and what is said of each that cannot be used."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.dataset.caption_files import pair, read_caption
from runner.dataset.metadata import MetadataProblem, read_metadata
from runner.errors import InvalidConfig
from tests.inprocess import prepared
from tests.support import Place, draw_pictures


def write_list(place: Place, *entries: Any, name: str = "list/m.jsonl") -> Path:
    file = place.folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries))
    return place.write({"dataset": {"held_out": None, "sources": [{"path": name, "class_tokens": "thing"}]}})


def problems(file: Path) -> list[str]:
    with pytest.raises(InvalidConfig) as caught:
        prepared(file)
    return [finding.message for finding in caught.value.diagnostics]


def test_absolute_paths_elsewhere(place: Place) -> None:
    """musubi-tuner's lists name their files from anywhere."""
    draw_pictures(place.folder / "elsewhere", 2)
    file = write_list(
        place,
        {"image_path": str(place.folder / "elsewhere" / "0.png"), "caption": "a"},
        {"image_path": "../elsewhere/1", "caption": "b"},
        {"image_path": str(place.folder / "pics" / "3.png")},
    )
    for _ in range(2):  # the second time from the index
        run = prepared(file)
        assert sorted((item.name, item.text) for item in run.collection.items) == [
            ("m/0.png", "a"),
            ("m/1.png", "b"),
            ("m/3.png", "thing"),
        ]
        assert run.dataset_notes.render() == [
            "1 of 3 pictures has no caption in the list and uses `thing` (m/3.png); give each a caption there"
        ]


def test_each_entry_has_its_own_reason(place: Place) -> None:
    folder = place.folder / "list"
    draw_pictures(folder, 2)
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "linked.png").symlink_to(place.folder / "pics" / "0.png")
    (folder / "sub").symlink_to(place.folder / "pics")
    (folder / "tied.png").symlink_to(folder / "0.png")
    file = write_list(
        place,
        {"image_path": "0.png"},
        {"image_path": "gone"},
        {"image_path": "broken.png"},
        {"image_path": "linked.png"},
        {"image_path": "sub/1.png"},
        {"image_path": "tied.png"},
        {"image_path": "a" * 300},
    )
    real = os.path.realpath(place.folder / "pics")
    allows = "dataset.follow_links = true allows such links"
    assert problems(file) == [
        "5 items cannot be used:\n"
        f"  m/{'a' * 120}…{'a' * 60} is listed, but its name is too long: 255 bytes a part and 4,095 in all are the most\n"
        "  m/broken.png cannot be decoded: its content is no picture of a known format\n"
        "  m/gone is listed, but there is no picture gone\n"
        f"  m/linked.png linked.png is a link out of its folder, to {real}/0.png; {allows}\n"
        f"  m/sub/1.png 1.png is a link out of its folder, to {real}/1.png; {allows}"
    ]
    assert (
        len(
            prepared(
                place.write(
                    {
                        "dataset": {
                            "held_out": None,
                            "on_bad_item": "skip",
                            "follow_links": True,
                            "sources": [{"path": "list/m.jsonl", "class_tokens": "x"}],
                        }
                    }
                )
            ).collection.items
        )
        == 4
    )


def test_control_images_of_a_list(place: Place, family_place: Any) -> None:
    made = family_place("framepack")
    folder = made.folder / "list"
    draw_pictures(folder, 6)
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "linked.png").symlink_to(made.folder / "pics" / "0.png")
    controls = ["5.png", "gone.png", "broken.png", "1.png,2.png", "linked.png"]
    lines = [
        json.dumps({"image_path": f"{n}.png", "caption": "x", "control_path": name}) for n, name in enumerate(controls)
    ]
    (folder / "m.jsonl").write_text("\n".join(lines))
    made.write({"dataset": {"held_out": None, "sources": [{"path": "list/m.jsonl"}]}})
    real = os.path.realpath(made.folder / "pics" / "0.png")
    assert problems(made.file) == [
        "4 items cannot be used:\n"
        "  m/1.png names the control image gone.png, which does not exist\n"
        "  m/2.png names the control image broken.png, which cannot be decoded: its content is no picture of a known format\n"
        "  m/3.png has 2 control images in one name, '1.png,2.png'; give them as control_path_0 and control_path_1\n"
        f"  m/4.png names a control image that is not read: linked.png is a link out of its folder, to {real}; "
        "dataset.follow_links = true allows such links"
    ]


def test_masks_that_cannot_be_used_say_why(place: Place) -> None:
    draw_pictures(place.folder / "masks", 10)
    (place.folder / "masks" / "3.png").write_bytes(b"no picture")
    (place.folder / "masks" / "4.png").unlink()
    file = place.write({"dataset": {"held_out": None, "sources": [{"path": "pics", "mask_path": "masks"}]}})
    assert problems(file) == [
        "2 items cannot be used:\n"
        f"  pics/3.png has a mask that cannot be used: 3.png in {place.folder / 'masks'} cannot be decoded: its content is no "
        "picture of a known format\n"
        f"  pics/4.png has no mask in {place.folder / 'masks'}"
    ]


def test_a_picture_that_is_listed_twice(place: Place) -> None:
    draw_pictures(place.folder / "list", 1)
    file = write_list(
        place, {"image_path": "0.png", "caption": "a"}, {"image_path": "./0", "caption": "b"}, {"image_path": "0.png"}
    )
    assert prepared(file).dataset_notes.render()[0] == (
        "1 picture is listed more than once in m.jsonl, and only the last line counts (0.png); list each once"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"image_path": "0.png", "caption": "\\ud800"}',
            "m.jsonl, line 1: '\\ud800' holds half a character (a lone surrogate)",
        ),
        ('\n{"image_path": "\\udcff.png"}', "m.jsonl, line 2: '\\udcff.png' holds half a character (a lone surrogate)"),
        ('{"image_path": "a\\u0000.png"}', "m.jsonl, line 1: 'a\\x00.png' holds a NUL character"),
        ('{"image_path": "0.png", "control_path": "\\u0000"}', "m.jsonl, line 1: '\\x00' holds a NUL character"),
        (
            '{"image_path": "0.png", "n": ' + "9" * 5000 + "}",
            "m.jsonl, line 1: no JSON (a number of it has more than 4,300 digits)",
        ),
        ("[" * 100_000, "m.jsonl, line 1: no JSON (it is nested too deeply)"),
        (
            '{"image_path": "0.png", "control_path_٣": "x", "tags": []}',
            "m.jsonl, line 1: caption and tags must be text",
        ),
    ],
)
def test_text_that_is_none_is_located(place: Place, content: str, message: str) -> None:
    file = write_list(place, content)
    assert problems(file) == [message]


def test_a_list_that_is_no_utf8(place: Place) -> None:
    file = write_list(place, "{}")
    (place.folder / "list" / "m.jsonl").write_bytes(b'{"image_path": "\xff"}')
    assert problems(file) == [f"{place.folder}/list/m.jsonl cannot be read: it is not UTF-8 (byte 16)"]


# --- any bytes --------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["image_path", "caption", "tags", "control_path", "control_path_1", "x"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)
LINES = JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40)


@given(lines=st.lists(LINES, max_size=4), ending=st.sampled_from([".json", ".jsonl"]))
@settings(max_examples=200, deadline=None)
def test_any_list_is_read_or_named(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], ending: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    file = folder / f"m{ending}"
    file.write_bytes(b"\n".join(lines))
    found = {}
    with contextlib.suppress(MetadataProblem):
        found = read_metadata(file, folder, follow_links=False)
    for path, entry in found.items():
        assert (path + entry.caption + "".join(entry.controls)).encode()


@given(content=st.binary(max_size=60) | st.text(st.characters(codec="utf-8"), max_size=40).map(str.encode))
@settings(max_examples=200, deadline=None)
def test_any_caption_file_is_read_or_named(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.txt"
    file.write_bytes(content)
    found = read_caption(file)
    assert (found.text is None) == (found.problem is not None)
    if found.text is not None:
        assert found.text.encode() == content.removeprefix(b"\xef\xbb\xbf")
        assert "\x00" not in found.text


NAMES = st.text(st.sampled_from("aAbB.eé\u0301txTX_1"), min_size=1, max_size=8)


@given(
    stems=st.lists(NAMES, max_size=5, unique=True),
    others=st.lists(NAMES.map(lambda n: n + ".TXT") | NAMES, max_size=8, unique=True),
)
@settings(max_examples=300, deadline=None)
def test_no_file_is_lost_when_captions_are_paired(stems: list[str], others: list[str]) -> None:
    pictures = [f"{stem}.png" for stem in stems]
    others = [name for name in others if name not in pictures]
    found = pair(pictures, others, ".txt")
    told = [*found.captions.values(), *found.second, *found.whole, *found.orphans, *found.rest]
    told += [name for names in found.other_ending.values() for name in names]
    assert set(told) == set(others)
    assert set(found.captions) <= set(pictures)
    assert pair(pictures, list(reversed(others)), ".txt") == found
