"""What the plan says of captions and folders: what is left out, how it is read, and the way out."""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runner.dataset.captions import CaptionRule, render
from runner.errors import InvalidConfig
from runner.plan.compile import compile_graph
from runner.seeding import rng
from schemas.dataset import ItemOptions
from tests.inprocess import prepared
from tests.support import Place, draw_pictures


def picture(file: Path, shade: int = 90) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (shade, 20, 255 - shade)).save(file)


def notes_of(place: Place, *sources: dict[str, Any], **dataset: Any) -> list[str]:
    place.write({"dataset": {"held_out": None, "sources": list(sources), **dataset}})
    return prepared(place.file).dataset_notes.render()


def texts_of(place: Place) -> dict[str, str]:
    return {item.name: item.text for item in prepared(place.file).collection.items}


def problems_of(place: Place, *sources: dict[str, Any], **dataset: Any) -> list[str]:
    place.write({"dataset": {"held_out": None, "sources": list(sources), **dataset}})
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.file)
    return [finding.message for finding in caught.value.diagnostics]


# --- which file is whose ----------------------------------------------------------------------------------------------


def test_endings_of_another_case_and_unicode_forms_are_used(place: Place) -> None:
    folder = place.folder / "10_cat"
    composed, decomposed = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")
    for shade, (name, text) in enumerate(
        {"a": "a.TXT", composed: f"{decomposed}.txt", f"{decomposed}2": f"{composed}2.Txt", "d": "d.txt"}.items()
    ):
        picture(folder / f"{name}.png", shade * 9)
        (folder / text).write_text(f"of {shade}")
    assert notes_of(place, {"path": "10_cat"}) == []
    assert sorted(texts_of(place).values()) == ["of 0", "of 1", "of 2", "of 3"]


def test_files_that_differ_in_case_only(place: Place) -> None:
    folder = place.folder / "10_cat"
    picture(folder / "a.png")
    picture(folder / "b.png", 3)
    for name in ("a.txt", "a.TXT", "b.Txt", "b.TXT"):
        (folder / name).write_text(name)
    assert notes_of(place, {"path": "10_cat"}) == [
        "2 text files differ from a picture's caption file only in case or Unicode form and are not used "
        "(10_cat/a.TXT, 10_cat/b.Txt); keep one of them"
    ]
    assert texts_of(place) == {"10_cat/a.png": "a.txt", "10_cat/b.png": "b.TXT"}


def test_text_files_that_nothing_uses_are_counted_with_a_way_out(place: Place) -> None:
    folder = place.folder / "10_cat"
    for number in range(6):
        picture(folder / f"{number}.jpeg", number)
    for name in ("0.txt", "1.txt", "2.jpeg.txt", "3.caption", "4.caption", "other.txt"):
        (folder / name).write_text("a dog")
    assert notes_of(place, {"path": "10_cat"}) == [
        "1 text file is named after a picture's whole name and is not used (10_cat/2.jpeg.txt); "
        "name it without the picture's ending: NAME.txt",
        "2 text files that are named after a picture end in .caption and are not used; captions end in .txt "
        '(10_cat/3.caption, 10_cat/4.caption); set caption_extension = ".caption", or rename them',
        "1 text file belongs to no picture and is not used (10_cat/other.txt); "
        "a caption has its picture's name, NAME.txt beside NAME.png",
        "4 of 6 pictures have no caption file and use `cat` (10_cat/2.jpeg, 10_cat/3.jpeg, 10_cat/4.jpeg, 10_cat/5.jpeg); "
        "a caption lies beside its picture, as NAME.txt",
    ]
    assert notes_of(place, {"path": "10_cat", "caption_extension": ".caption"})[-1].startswith(
        "4 of 6 pictures have no"
    )


def test_a_picture_without_words_names_the_file_that_may_have_been_meant(place: Place) -> None:
    picture(place.folder / "cats" / "a.png")
    (place.folder / "cats" / "a.png.txt").write_text("a cat")
    assert problems_of(place, {"path": "cats"}) == [
        "1 item cannot be used:\n  cats/a.png has no caption file (a.txt; a.png.txt is none), and its source no class_tokens"
    ]


def test_a_face_in_the_name_is_no_part_of_the_captions_name(place: Place) -> None:
    """sd-scripts reads anna.txt for anna_320_200_96_110.png."""
    picture(place.folder / "cats" / "anna_16_16_8_8.png")
    (place.folder / "cats" / "anna.txt").write_text("anna, smiling")
    assert notes_of(place, {"path": "cats"}) == []
    assert list(texts_of(place).values()) == ["anna, smiling"]


# --- how it reads -----------------------------------------------------------------------------------------------------


def caption(text: str, whole: bool = False, **options: Any) -> str:
    return render(text, CaptionRule.of(ItemOptions(**options), whole), rng(0, "test"))


def test_one_line_or_the_whole_text() -> None:
    assert caption("\n one\r\ntwo\n") == "one"
    assert caption("\n one \r\n\r\ntwo\n", whole=True) == "one \n\ntwo"
    assert caption("one\u2028still one\x0bstill", whole=False) == "one\u2028still one\x0bstill", (
        "only \\r and \\n end a line"
    )
    assert caption("one\ntwo", whole=True, caption_prefix="x") == "x one\ntwo"
    assert {
        render("one\ntwo", CaptionRule.of(ItemOptions(enable_wildcard=True), True), rng(n, "x")) for n in range(20)
    } == {"one", "two"}


def test_captions_of_several_lines(place: Place, family_place: Callable[..., Place]) -> None:
    (place.folder / "pics" / "3.txt").write_text("first\nsecond\n")
    (place.folder / "pics" / "4.txt").write_text("only\n\n")
    assert notes_of(place, {"path": "pics"}) == [
        "1 of 10 captions has several lines, of which the first is used (pics/3.png); "
        "enable_wildcard = true draws one of the lines at each use; or write each caption into one line"
    ]
    assert notes_of(place, {"path": "pics", "enable_wildcard": True}) == []
    for name in ("hunyuan_video", "framepack"):
        other = family_place(name, dataset={"held_out": None})
        (other.folder / "pics" / "3.txt").write_text("first\nsecond\n")
        run = prepared(other.file)
        assert [note for note in run.dataset_notes.render() if "lines" in note] == []
        assert {item.settings.captions.whole for item in run.collection.items} == {True}
    file = '[general]\ncaption_extension = ".txt"\nresolution = [32, 32]\n[[datasets]]\nimage_directory = "pics"\n'
    (place.folder / "dataset.toml").write_text(file)
    place.write({"dataset": {"batch_size": None, "held_out": None, "sources": None, "config_file": "dataset.toml"}})
    run = prepared(place.file)
    assert run.dataset_notes.render() == [], "musubi-tuner keeps all lines"
    assert {item.settings.captions.whole for item in run.collection.items} == {True}
    (place.folder / "dataset.toml").write_text(file.replace("image_directory", "[[datasets.subsets]]\nimage_dir"))
    run = prepared(place.file)
    assert ["several lines" in note for note in run.dataset_notes.render()] == [True]


def test_the_rule_of_lines_is_part_of_the_fingerprint(place: Place) -> None:
    file = '[general]\ncaption_extension = ".txt"\nresolution = [32, 32]\n[[datasets]]\nimage_directory = "pics"\n'
    changes = {"dataset": {"batch_size": None, "held_out": None, "sources": None, "config_file": "dataset.toml"}}
    (place.folder / "dataset.toml").write_text(file)
    whole = compile_graph(prepared(place.write(changes))).fingerprint("train")
    (place.folder / "dataset.toml").write_text(file.replace("image_directory", "[[datasets.subsets]]\nimage_dir"))
    assert compile_graph(prepared(place.file)).fingerprint("train") != whole


def test_empty_captions(place: Place) -> None:
    (place.folder / "pics" / "3.txt").write_text(" \n")
    assert notes_of(place, {"path": "pics"}) == [
        "1 caption is empty, and what it belongs to is trained without words (pics/3.png); "
        "write it; or delete the file, so that class_tokens are used"
    ]


# --- what else lies there ---------------------------------------------------------------------------------------------


def test_other_files_and_folders_are_counted(place: Place) -> None:
    pics = place.folder / "pics"
    (pics / "notes.pdf").write_bytes(b"%PDF")
    (pics / "0.npz").write_bytes(b"PK")
    (pics / "clip.mp4").write_bytes(b"x")
    (pics / ".DS_Store").write_bytes(b"x")
    draw_pictures(pics / "more", 1)
    found = notes_of(place, {"path": "pics"})
    assert len(found) == 3
    assert (
        found[0]
        == '1 video lies among pictures and is not used (pics/clip.mp4); name the folder again as a source of kind = "video"'
    )
    assert found[1].startswith(
        "2 files are neither pictures nor captions and are not used (pics/0.npz, pics/notes.pdf); pictures end in "
    )
    assert found[2] == "1 folder lies among pictures and is not read (pics/more); name each as a source of its own"


def kohya_tree(place: Place) -> Path:
    tree = place.folder / "tree"
    for name in ("10_cat", "2_dog"):
        draw_pictures(tree / name, 2, seed=len(name))
    return tree


def test_a_stray_picture_does_not_hide_the_numbered_folders(place: Place) -> None:
    picture(kohya_tree(place) / "preview.png")
    assert notes_of(place, {"path": "tree"}) == [
        "1 picture lies beside folders with a number of repeats, which are trained instead, and is not used "
        "(tree/preview.png); move it into a folder such as 1_name"
    ]
    run = prepared(place.file)
    assert sorted({(item.name.split("/")[0], item.repeats) for item in run.collection.items}) == [
        ("10_cat", 10),
        ("2_dog", 2),
    ]
    # A folder with a number of its own is one of pictures.
    shutil.move(place.folder / "tree", place.folder / "3_both")
    assert {
        item.repeats
        for item in prepared(
            place.write({"dataset": {"held_out": None, "sources": [{"path": "3_both", "class_tokens": "x"}]}})
        ).collection.items
    } == {3}


def test_no_repeats_and_no_number(place: Place) -> None:
    tree = kohya_tree(place)
    draw_pictures(tree / "0_off", 2)
    draw_pictures(tree / "plain", 2)
    (tree / "5_empty").mkdir()
    assert notes_of(place, {"path": "tree"}) == [
        "1 folder has no number of repeats in the name and is left out (tree/plain); "
        "rename it, as 1_name, or make each a source of its own",
        "1 folder holds no pictures and is left out (tree/5_empty); fill or remove it",
        "1 folder has 0 repeats in the name and is left out (0_off); give it another number",
    ]
    assert {item.name.split("/")[0] for item in prepared(place.file).collection.items} == {"10_cat", "2_dog"}


def test_a_source_of_no_repeats(place: Place) -> None:
    draw_pictures(place.folder / "0_off", 2)
    assert notes_of(place, {"path": "pics"}, {"path": "0_off"}) == [
        "1 folder has 0 repeats in the name and is left out (0_off); give it another number"
    ]
    assert problems_of(place, {"path": "0_off"}) == ["the folder 0_off has 0 repeats in its name, and no other is left"]
    assert notes_of(place, {"path": "0_off", "repeats": 2}) == []
    assert {item.repeats for item in prepared(place.file).collection.items} == {2}


def test_a_dataset_files_folder_is_the_folder(place: Place) -> None:
    """sd-scripts reads no number from the name of image_dir, and opens no folders in it."""
    draw_pictures(place.folder / "10_cat", 3)
    draw_pictures(place.folder / "10_cat" / "5_more", 3, seed=8)
    text = '[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 32\n[[datasets.subsets]]\nimage_dir = "10_cat"\n'
    (place.folder / "dataset.toml").write_text(text)
    place.write({"dataset": {"batch_size": None, "held_out": None, "sources": None, "config_file": "dataset.toml"}})
    run = prepared(place.file)
    assert {(item.name.split("/")[0], item.repeats) for item in run.collection.items} == {("10_cat", 1)}
    assert run.dataset_notes.render() == [
        "1 folder has a number in the name, which a dataset file does not read (10_cat); set num_repeats there",
        "1 folder lies among pictures and is not read (10_cat/5_more); name each as a source of its own",
    ]


# --- links, pipes and names -------------------------------------------------------------------------------------------


def test_a_caption_that_is_a_link_out_of_its_folder(place: Place) -> None:
    secret = place.folder / "secret.txt"
    secret.write_text("a password")
    inside = place.folder / "pics" / "0.txt"
    inside.rename(place.folder / "pics" / "real.note")
    inside.symlink_to("real.note")
    assert len(notes_of(place, {"path": "pics"})) == 1, "a link inside of the folder is fine"
    (place.folder / "pics" / "1.txt").unlink()
    (place.folder / "pics" / "1.txt").symlink_to(secret)
    assert problems_of(place, {"path": "pics"}) == [
        "1 item cannot be used:\n  pics/1.png is left out: its caption file 1.txt is a link out of its folder, to "
        f"{os.path.realpath(secret)}; dataset.follow_links = true allows such links"
    ]
    notes_of(place, {"path": "pics"}, follow_links=True)
    assert texts_of(place)["pics/1.png"] == "a password"


def test_pictures_may_be_links(place: Place) -> None:
    picture(place.folder / "far" / "a.png")
    (place.folder / "near").mkdir()
    (place.folder / "near" / "a.png").symlink_to(place.folder / "far" / "a.png")
    (place.folder / "near" / "a.txt").write_text("a cat")
    assert notes_of(place, {"path": "near"}) == []
    assert texts_of(place) == {"near/a.png": "a cat"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_only_regular_text_files_are_opened(place: Place) -> None:
    pics = place.folder / "pics"
    for number in (1, 2, 3, 4, 5):
        (pics / f"{number}.txt").unlink()
    os.mkfifo(pics / "1.txt")
    (pics / "2.txt").symlink_to("/dev/zero")
    (pics / "3.txt").write_bytes(b"\xff\xfea\x00")
    (pics / "4.txt").write_bytes(b"a\x00b")
    with open(pics / "5.txt", "wb") as stream:
        stream.truncate(2 * 2**30)
    assert problems_of(place, {"path": "pics"}, follow_links=True) == [
        "5 items cannot be used:\n"
        "  pics/1.png has a caption file that cannot be used: 1.txt cannot be read: it is a named pipe, not a file\n"
        "  pics/2.png has a caption file that cannot be used: 2.txt cannot be read: it is a device, not a file\n"
        "  pics/3.png has a caption file that cannot be used: 3.txt is UTF-16; save it as UTF-8\n"
        "  pics/4.png has a caption file that cannot be used: 4.txt holds NUL characters; save it as UTF-8\n"
        "  pics/5.png has a caption file that cannot be used: 5.txt cannot be read: it has 2,147,483,648 bytes; at most 1,000,000 are read"
    ]


def test_names_that_are_not_utf8_are_named(place: Place) -> None:
    pics = os.fsencode(place.folder / "pics")
    try:
        shutil.copy(os.path.join(pics, b"0.png"), os.path.join(pics, b"caf\xe9.png"))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    for name in (b"caf\xe9.txt", b"caf\xe9.pdf"):
        with open(os.path.join(pics, name), "w") as stream:
            stream.write("a cat")
    assert problems_of(place, {"path": "pics"}) == [
        "1 item cannot be used:\n  pics/caf\\xe9.png has a name that is not UTF-8; rename it"
    ]
    place.write({"dataset": {"held_out": None, "on_bad_item": "skip"}})
    assert prepared(place.file).dataset_notes.render() == [
        "2 names are not UTF-8, and what they name is left out (pics/caf\\xe9.pdf, pics/caf\\xe9.txt); rename them"
    ]
    os.mkdir(os.path.join(os.fsencode(kohya_tree(place)), b"3_\xe9"))
    assert notes_of(place, {"path": "tree"}) == [
        "1 name is not UTF-8, and what it names is left out (tree/3_\\xe9); rename it"
    ]
    result = place.run("plan")
    assert (result.code, "Traceback" in result.err + result.out) == (0, False)
