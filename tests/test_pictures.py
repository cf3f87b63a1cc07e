"""Pictures as they lie in people's folders: every format, mode and orientation gives the right pixels, or its reason."""

from __future__ import annotations

import os
import re
import struct
import sys
import types
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from runner.data.images import PictureRequest
from runner.dataset.encodings import Mask
from runner.dataset.known import known_pictures
from runner.dataset.probe import probe_image
from runner.families.framepack.sampling import _control, _fitted, _opened
from runner.media import IMAGE_EXTENSIONS
from runner.pictures import as_rgb, probe_picture, read_picture
from runner.store.index import Index
from tests.fuzzing import bounded
from tests.inprocess import prepared
from tests.support import Place, draw_clip

ROOT = Path(__file__).parent.parent


def saved(picture: Image.Image, form: str, **options: Any) -> bytes:
    stream = BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


def png(depth: int, kind: int, row: bytes, width: int, key: bytes = b"") -> bytes:
    """One row, with samples of so many bits and a transparent colour."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + (chunk(b"tRNS", key) if key else b"")
        + chunk(b"IDAT", zlib.compress(b"\0" + row))
        + chunk(b"IEND", b"")
    )


def rgb(content: bytes, ground: str | None = "white") -> list[tuple[int, ...]]:
    picture = as_rgb(read_picture(content), ground)
    return [tuple(row) for row in np.asarray(picture).reshape(-1, 3).tolist()]


# --- what is opened ---------------------------------------------------------------------------------------------------


def test_pictures_are_opened_in_one_place_with_named_formats() -> None:
    """Pillow's own choice would start Ghostscript for an EPS."""
    opened = []
    for folder in ("runner", "schemas", "tools", "benchmarks"):
        for file in (ROOT / folder).rglob("*.py"):
            for line in file.read_text(encoding="utf-8").splitlines():
                if re.search(r"\bImage\.open\(", line):
                    opened.append((file.relative_to(ROOT).as_posix(), "formats=" in line))
    assert ("runner/pictures.py", True) in opened
    assert all(named for _, named in opened), opened
    videos = [
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "runner").rglob("*.py")
        if re.search(r"\bav\.open\((?!stream, \"w\")", file.read_text(encoding="utf-8"))
    ]
    assert videos == ["runner/dataset/frames.py"], "playlists and scripts would name other files to read"


def test_an_eps_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    witness = tmp_path / "started"
    (tmp_path / "bin").mkdir()
    for name in ("gs", "gswin64c"):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\ntouch {witness}\necho 10.0\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    assert probe_image(tmp_path / "x.png").problem == "cannot be decoded: its content is no picture of a known format"
    assert not witness.exists()


@pytest.mark.parametrize("name", ["fifo", "zero", "folder", "sparse", "nothing"])
def test_what_is_no_file_is_named_and_nobody_waits(tmp_path: Path, name: str) -> None:
    file = tmp_path / "f.png"
    if name == "fifo":
        os.mkfifo(file)
    elif name == "zero":
        file.symlink_to("/dev/zero")
    elif name == "folder":
        file.mkdir()
    elif name == "sparse":
        with open(file, "wb") as stream:
            stream.truncate(20 * 2**30)
    else:
        file.symlink_to(tmp_path / "gone.png")
    expected = {
        "fifo": "cannot be read: it is a named pipe, not a file",
        "zero": "cannot be read: it is a device, not a file",
        "folder": "cannot be read: it is a folder, not a file",
        "sparse": "cannot be read: it has 21,474,836,480 bytes; at most 536,870,912 are read",
        "nothing": "cannot be read: No such file or directory",
    }
    with bounded(2, 100):
        assert probe_image(file).problem == expected[name]


def test_pipes_as_masks_controls_and_prompt_pictures_are_named(place: Place) -> None:
    masks = place.folder / "masks"
    masks.mkdir()
    for number in range(10):
        Image.new("L", (32, 32), 255).save(masks / f"{number}.png")
    (masks / "3.png").unlink()
    os.mkfifo(masks / "3.png")
    place.write({"dataset": {"sources": [{"path": "pics", "mask_path": "masks"}]}})
    from runner.errors import InvalidConfig

    with bounded(20, 1000), pytest.raises(InvalidConfig, match=r"3\.png"):
        prepared(place.file)


def test_bytes_that_are_no_picture_say_why() -> None:
    wide = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    wide += struct.pack(">I", zlib.crc32(wide[12:])) + b"\0\0\0\0IDAT" + b"5\xaf\x06\x1e"
    whole = saved(Image.effect_noise((64, 64), 50), "JPEG")
    for content, reason in (
        (b"", "it is empty"),
        (b"GIF", "its content is no picture of a known format"),
        (wide, "it has more than 178,956,970 pixels"),
        (whole[: len(whole) // 2], "image file is truncated"),
    ):
        with pytest.raises(OSError, match=f"^.Errno [0-9]+. {reason}"):
            probe_picture(content)


@pytest.mark.parametrize(
    ("content", "package"),
    [(b"\0\0\0\x18ftypheic" + bytes(20), "pillow-heif"), (b"\xff\x0a" + bytes(20), "pillow-jxl-plugin")],
)
def test_a_format_that_needs_a_package_names_it_and_is_tried_again(
    tmp_path: Path, content: bytes, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    (tmp_path / "IMG_1.heic").write_bytes(content)
    found = probe_image(tmp_path / "IMG_1.heic")
    assert found.problem is not None
    assert f"pictures need {package}: pip install 'runner[pictures]'" in found.problem
    index = Index(tmp_path / "index.sqlite")
    assert known_pictures(str(tmp_path), ["IMG_1.heic"], index)["IMG_1.heic"] == found
    assert not index.unchanged(str(tmp_path), ["IMG_1.heic"]), "the package may come"
    (tmp_path / "broken.png").write_bytes(b"no picture")
    known_pictures(str(tmp_path), ["broken.png"], index)
    assert index.unchanged(str(tmp_path), ["broken.png"])["broken.png"].problem is not None, "this stays"


def test_a_jpeg_xl_tells_its_size_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plugin decodes at once."""
    monkeypatch.setitem(sys.modules, "pillow_jxl", types.ModuleType("pillow_jxl"))
    bare = (0 | 3 << 1 | (2**20 - 1) << 3 | 1 << 33).to_bytes(12, "little")  # not small; 30 bits of height; square
    boxed = b"\0\0\0\x0cJXL \r\n\x87\n" + struct.pack(">I4s", 64, b"jxlc") + b"\xff\x0a" + bare + bytes(40)
    for content in (b"\xff\x0a" + bare + bytes(40), boxed):
        with pytest.raises(OSError, match="it has more than 178,956,970 pixels"):
            probe_picture(content)


@pytest.mark.parametrize(("form", "module"), [("HEIF", "pillow_heif"), ("JXL", "pillow_jxl")])
def test_pictures_of_the_extra(form: str, module: str) -> None:
    plugin = pytest.importorskip(module)
    if form == "HEIF":
        plugin.register_heif_opener()
    drawn = Image.effect_noise((24, 16), 60).convert("RGBA")
    drawn.putalpha(90)
    content = saved(drawn, form)
    assert probe_picture(content) == ((24, 16), "transparent")
    for end in range(4, len(content) - 1, max(1, len(content) // 20)):
        with pytest.raises(OSError, match="Errno"):
            probe_picture(content[:end])


def test_every_ending_of_pillow_is_read(tmp_path: Path) -> None:
    forms = {
        ".png": "PNG",
        ".apng": "PNG",
        ".jpg": "JPEG",
        ".jpeg": "JPEG",
        ".jpe": "JPEG",
        ".jfif": "JPEG",
        ".webp": "WEBP",
        ".bmp": "BMP",
        ".dib": "BMP",
        ".gif": "GIF",
        ".tif": "TIFF",
        ".tiff": "TIFF",
        ".avif": "AVIF",
    }
    assert set(forms) | {".heic", ".heif", ".hif", ".jxl"} == IMAGE_EXTENSIONS
    for ending, form in forms.items():
        file = tmp_path / f"x{ending}"
        file.write_bytes(saved(Image.new("RGB", (6, 4), (200, 30, 10)), form))
        found = probe_image(file)
        assert (found.width, found.height, found.problem, found.facts) == (6, 4, None, ""), ending
        assert np.abs(np.array(rgb(file.read_bytes())[0]) - (200, 30, 10)).max() < 12, ending


# --- pixels -----------------------------------------------------------------------------------------------------------


def see_through() -> dict[str, bytes]:
    """Each way to be transparent: two pixels, of which the first is hidden and dark, the second shown."""
    grey = Image.merge("LA", (Image.frombytes("L", (2, 1), b"\x05\x64"), Image.frombytes("L", (2, 1), b"\0\xff")))
    palette = Image.frombytes("P", (2, 1), b"\0\1")
    palette.putpalette([5, 5, 5, 100, 100, 100])
    return {
        "RGBA": saved(grey.convert("RGBA"), "PNG"),
        "LA": saved(grey, "PNG"),
        "PA": saved(grey.convert("RGBA"), "WEBP", lossless=True, exact=True),
        "P": saved(palette, "PNG", transparency=b"\0\xff"),
        "gif": saved(palette, "GIF", transparency=0),
        "L with a key": png(8, 0, bytes([5, 100]), 2, b"\0\x05"),
        "RGB with a key": png(8, 2, bytes([5, 5, 5, 100, 100, 100]), 2, bytes([0, 5, 0, 5, 0, 5])),
        "16 bits with a key": png(16, 0, struct.pack(">2H", 1300, 100 * 257), 2, struct.pack(">H", 1300)),
        "48 bits with a key": png(
            16, 2, struct.pack(">6H", *[1300] * 3, *[100 * 257] * 3), 2, struct.pack(">3H", *[1300] * 3)
        ),
        "4 bits with a key": png(4, 0, bytes([0x16]), 2, b"\0\1"),
    }


@pytest.mark.parametrize("kind", see_through())
def test_what_is_transparent_stands_on_white(kind: str) -> None:
    content = see_through()[kind]
    shown = 102 if kind == "4 bits with a key" else 100
    assert rgb(content) == [(255,) * 3, (shown,) * 3]
    assert "transparent" in probe_picture(content)[1].split()


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    assert rgb(saved(Image.new("RGBA", (1, 1), (0, 0, 0, 128)), "PNG")) == [(127, 127, 127)]


def test_an_alpha_channel_that_hides_nothing_is_no_transparency() -> None:
    content = saved(Image.new("RGBA", (2, 1), (9, 8, 7, 255)), "PNG")
    assert probe_picture(content) == ((2, 1), "")
    assert rgb(content) == [(9, 8, 7)] * 2


RAMP = np.array([[0, 100 * 257, 65535]], dtype=np.uint16)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("png", saved(Image.fromarray(RAMP), "PNG")),
        ("tiff", saved(Image.fromarray(RAMP), "TIFF")),
        ("32 bits", saved(Image.fromarray(RAMP.astype(np.int32)), "TIFF")),
        ("32 bits of 8", saved(Image.fromarray((RAMP // 257).astype(np.int32)), "TIFF")),
        ("fractions", saved(Image.fromarray(RAMP.astype(np.float32) / 65535), "TIFF")),
        ("fractions of 255", saved(Image.fromarray(RAMP.astype(np.float32) / 257), "TIFF")),
    ],
)
def test_grey_of_more_bits_is_scaled(name: str, content: bytes) -> None:
    assert rgb(content) == [(0,) * 3, (100,) * 3, (255,) * 3]
    assert probe_picture(content)[1] == "deep"


def test_white_is_zero_where_a_tiff_says_so() -> None:
    content = saved(Image.fromarray(RAMP), "TIFF", tiffinfo={262: 0})
    assert rgb(content) == [(255,) * 3, (155,) * 3, (0,) * 3]


def test_colours_of_48_bits_and_of_print_stay_right() -> None:
    assert rgb(png(16, 2, struct.pack(">6H", 65535, 32768, 0, 257, 514, 771), 2)) == [(255, 128, 0), (1, 2, 3)]
    ink = Image.new("CMYK", (2, 1), (10, 20, 30, 40))
    for form in ("TIFF", "JPEG"):
        assert rgb(saved(ink, form)) == [(207, 198, 190)] * 2
        assert probe_picture(saved(ink, form)) == ((2, 1), "")


def test_megabytes_of_text_are_no_damage() -> None:
    """ComfyUI writes its workflows into pictures."""
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    for number in range(3):
        text.add_text(f"note {number}", "y" * 30_000_000)
    assert probe_picture(saved(Image.new("RGB", (4, 2), (1, 2, 3)), "PNG", pnginfo=text)) == ((4, 2), "")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_upright(form: str, orientation: int) -> None:
    drawn = Image.new("RGB", (32, 16))
    drawn.paste((255, 255, 255), (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"tiffinfo": {0x0112: orientation}} if form == "TIFF" else {"exif": exif}
    content = saved(drawn, form, **options)
    shown = np.asarray(read_picture(content).convert("L"))
    bright = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[orientation]
    height, width = shown.shape
    assert (width, height) == ((32, 16) if orientation < 5 else (16, 32)) == probe_picture(content)[0]
    quarters = shown.reshape(2, height // 2, 2, width // 2).mean(axis=(1, 3))
    assert np.unravel_index(quarters.argmax(), (2, 2)) == bright


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "AVIF", "TIFF"])
def test_of_several_frames_the_first_is_used(form: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 0, 250))]
    content = saved(frames[0], form, save_all=True, append_images=frames[1:])
    assert probe_picture(content) == ((16, 16), "animated")
    assert np.abs(np.array(rgb(content)[0]) - (250, 0, 0)).max() < 8
    assert probe_picture(saved(frames[0], form)) == ((16, 16), "")


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_the_plan_counts_what_is_not_used(place: Place) -> None:
    """Transparent and animated pictures; one whose alpha hides nothing counts not."""
    pics = place.folder / "pics"
    for number, alpha in ((0, 0), (1, 128), (2, 255)):
        picture = Image.open(pics / f"{number}.png").convert("RGBA")
        picture.putalpha(alpha)
        picture.save(pics / f"{number}.png")
    frames = [Image.effect_noise((32, 32), 90 + number).convert("RGB") for number in range(3)]
    frames[0].save(pics / "moving.gif", save_all=True, append_images=frames[1:])
    (pics / "moving.txt").write_text("it moves")
    place.write({})
    run = prepared(place.file)
    said = [note.render() for note in run.dataset_notes]
    assert (
        "1 picture has several frames or pages; the first is used (pics/moving.gif); save what else is wanted as pictures of their own, or as videos where the model trains on them"
        in said
    )
    assert (
        "2 pictures have transparent pixels; white stands behind them (pics/0.png, pics/1.png); alpha_mask = true trains only "
        "on what is opaque; for another ground, paint it"
    ) in said
    again = [note.render() for note in prepared(place.file).dataset_notes]
    assert again == said, "from the index"
    place.write({"dataset": {"alpha_mask": True}})
    assert not any("transparent" in note.message for note in prepared(place.file).dataset_notes)


def test_only_what_is_decoded_in_another_way_has_another_key(place: Place) -> None:
    """Encodings of plain pictures, made before transparency was put on white, stay good."""
    pics = place.folder / "pics"
    picture = Image.open(pics / "0.png").convert("RGBA")
    picture.putalpha(100)
    picture.save(pics / "0.png")
    Image.fromarray(np.full((32, 32), 40000, np.uint16)).save(pics / "1.png")
    place.write({})
    run = prepared(place.file)
    keys = {item.name: item.picture for item in [*run.collection.items, *run.collection.held_out]}
    digests = {item.name: item.digest for item in [*run.collection.items, *run.collection.held_out]}
    assert keys["pics/0.png"] == f"{digests['pics/0.png']} transparent"
    assert keys["pics/1.png"] == f"{digests['pics/1.png']} deep"
    assert all(keys[f"pics/{number}.png"] == digests[f"pics/{number}.png"] for number in range(2, 10))
    place.write({"dataset": {"alpha_mask": True}})
    run = prepared(place.file)
    masked = {item.name: item.picture for item in [*run.collection.items, *run.collection.held_out]}
    assert masked["pics/0.png"] == f"{digests['pics/0.png']} alpha", "as before: the mask hides it"


def test_with_alpha_mask_the_colour_behind_stays(place: Place) -> None:
    """The mask takes it out of the loss."""
    file = place.folder / "pics" / "0.png"
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(file)
    run = prepared(place.file)
    item = next(item for item in [*run.collection.items, *run.collection.held_out] if item.name == "pics/0.png")
    view = item.fit.centre
    assert PictureRequest(item.path, item.digest, view).pixels().min() == 1
    assert PictureRequest(item.path, item.digest, view, Mask(None, "")).pixels().max() == -1


def test_masks_of_16_bits_and_with_holes(place: Place) -> None:
    """Half is half; what is transparent does not count, whatever colour hides there."""
    run = prepared(place.file)
    item = run.collection.items[0]
    deep, holes = place.folder / "deep.png", place.folder / "holes.png"
    Image.fromarray(np.full((32, 32), 32768, np.uint16)).save(deep)
    hidden = Image.new("RGBA", (32, 32), (255, 255, 255, 255))
    hidden.paste((255, 255, 255, 0), (0, 0, 16, 32))
    hidden.save(holes)

    def mask_of(file: Path) -> Any:
        mask = Mask(str(file), probe_image(file).digest)
        return PictureRequest(item.path, item.digest, item.fit.centre, mask).mask_pixels()

    assert abs(float(mask_of(deep).mean()) - 0.5) < 0.01
    assert float(mask_of(holes).mean()) == pytest.approx(0.5, abs=0.05)


def test_pictures_of_prompts_stand_on_white_too(family_place: Callable[..., Place]) -> None:
    place = family_place("framepack")
    hidden = Image.new("RGBA", (64, 48), (0, 0, 0, 0))
    hidden.save(place.folder / "start.png")
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue")]
    frames[0].save(place.folder / "end.gif", save_all=True, append_images=frames[1:])
    draw_clip(place.folder / "clips" / "a.mp4", 40, fps=30)
    (place.folder / "clips" / "a.txt").write_text("a thing moves")
    prompt = {"prompt": "a thing", "image": "start.png", "end_image": "end.gif", "sections": 2}
    place.write(
        {
            "model": {"variant": "i2v"},
            "network": {"rank": 2},
            "training": {"max_train_steps": 2},
            "dataset": {"held_out": None, "sources": [{"path": "clips", "kind": "video", "frame_extraction": "full"}]},
            "sampling": {"prompts": [prompt]},
        }
    )
    run = prepared(place.file)
    assert "prompt 1: start.png has transparent pixels; white stands behind them" in run.notes
    assert "prompt 1: end.gif has several frames or pages; the first is used" in run.notes
    assert not [note.render() for note in run.dataset_notes], "FramePack's 30 fps"
    video = run.prompts[0].own
    assert video is not None
    assert [file.identity() for file in video.images] == [f"{video.images[0].digest} transparent"] * len(video.images)
    assert _fitted(_opened(video.images[0]), run.prompts[0]).getextrema() == ((255, 255),) * 3
    pixels, alpha = _control(video.images[0], run.prompts[0], None)
    assert pixels.max() == -1, "a control image's transparency is its mask"
    assert alpha is not None
    assert not alpha.any()
    masked, alpha = _control(video.images[0], run.prompts[0], video.end_image)
    assert masked.min() == 1, "a mask of its own stands for it"
    assert alpha is not None
    assert alpha.all()
