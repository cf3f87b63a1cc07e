"""Pictures and videos with bytes cut off, changed and repeated: refused in words, or the same for planning and encoding."""

from __future__ import annotations

import tempfile
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from runner.data.images import PictureRequest
from runner.data.videos import read_clip
from runner.dataset.buckets import Fit, cover
from runner.dataset.clips import Clip
from runner.dataset.probe import probe_image, probe_video
from tests.fuzzing import bounded, fuzz
from tests.test_clips import HEALTHY, healthy
from tests.test_pictures import saved, see_through

BUCKET = (16, 16)


@cache
def pictures() -> list[bytes]:
    drawn = Image.effect_noise((20, 12), 60).convert("RGB")
    frames = [Image.effect_noise((20, 12), 60 + number) for number in range(3)]
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        *(saved(drawn, form) for form in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")),
        *(saved(frames[0], form, save_all=True, append_images=frames[1:]) for form in ("PNG", "GIF", "WEBP", "TIFF")),
        saved(drawn, "JPEG", exif=exif, progressive=True),
        saved(drawn, "TIFF", compression="tiff_lzw"),
        saved(Image.fromarray(np.arange(240, dtype=np.uint16).reshape(12, 20) * 200), "PNG"),
        saved(Image.fromarray(np.arange(240, dtype=np.float32).reshape(12, 20)), "TIFF"),
        *see_through().values(),
    ]


changes = st.lists(
    st.tuples(
        st.sampled_from(["cut", "set", "zero", "repeat", "insert"]),
        st.floats(0, 1),
        st.integers(1, 40),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)


def changed(content: bytes, how: list[tuple[str, float, int, bytes]]) -> bytes:
    """`content` with its changes one after the other."""
    for kind, part, length, piece in how:
        place = int(part * len(content))
        before, after = content[:place], content[place:]
        if kind == "cut":
            content = before
        elif kind == "set":
            content = before + piece + after[len(piece) :]
        elif kind == "zero":
            content = before + bytes(min(length, len(after))) + after[length:]
        elif kind == "repeat":
            content = before + after[:length] + after
        else:
            content = before + piece + after
    return content


@fuzz(150)
@given(number=st.integers(0, len(see_through()) + 14), how=changes)
def test_pictures(number: int, how: list[tuple[str, float, int, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as folder, bounded(5):
        file = Path(folder, "x.png")
        file.write_bytes(changed(pictures()[number], how))
        found = probe_image(file)
        if found.problem is not None:
            assert len(found.problem) < 300
            return
        size = (found.width, found.height)
        view = Fit(BUCKET, cover(size, BUCKET), size).centre
        pixels = PictureRequest(str(file), found.digest, view).pixels()
        assert pixels.shape == (3, 16, 16)
        assert bool(pixels.isfinite().all())


@fuzz(60)
@given(number=st.integers(0, len(HEALTHY) - 1), how=changes)
def test_videos(number: int, how: list[tuple[str, float, int, bytes]]) -> None:
    """What is taken can be read to its last frame: threads of frames and of slices count alike."""
    with tempfile.TemporaryDirectory() as folder, bounded(20, 1000):
        file = Path(folder, "x.mp4")
        file.write_bytes(changed(healthy(number), how))
        found = probe_video(file)
        if found.problem is not None:
            assert len(found.problem) < 300
            return
        size, frames = (found.width, found.height), int(found.text or 0)
        view = Fit(BUCKET, cover(size, BUCKET), size).centre
        assert read_clip(str(file), found.digest, Clip(0, frames, None, 24.0), view).shape == (3, frames, 16, 16)


def test_the_corpus_is_read() -> None:
    assert len(pictures()) == len(see_through()) + 15
    for content in pictures():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "x.png")
            file.write_bytes(content)
            assert probe_image(file).problem is None
    assert BytesIO(pictures()[0]).read(4) == b"\x89PNG"
