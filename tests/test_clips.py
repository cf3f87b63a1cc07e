"""Videos as they lie in people's folders: every cut is found, every whole one taken; rates, orientations, folders."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from runner.data.videos import read_clip
from runner.dataset.buckets import Fit
from runner.dataset.clips import Clip
from runner.dataset.containers import said_bytes
from runner.dataset.frames import frame_names, frame_picture, open_video, video_frames
from runner.dataset.probe import probe_video
from runner.errors import InvalidConfig
from tests.fuzzing import bounded
from tests.inprocess import prepared
from tests.support import Place, draw_pictures

Make = Callable[..., Place]
SIZE = (64, 48)
GROUND = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
QUICK = {
    "libx264": {"preset": "ultrafast", "g": "6", "bf": "2"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:keyint=6"},
    "libvpx-vp9": {"cpu-used": "8", "deadline": "realtime", "g": "6"},
    "libsvtav1": {"preset": "12"},
    "mpeg4": {"bf": "2"},
}
HEALTHY = [
    ("libx264", "mp4", {}),
    ("libx264", "mp4", {"movflags": "faststart"}),
    ("libx264", "mp4", {"movflags": "frag_keyframe+empty_moov"}),
    ("libx264", "mov", {}),
    ("libx264", "matroska", {}),
    ("libx264", "flv", {}),
    ("libx264", "avi", {}),
    ("libx265", "mp4", {"movflags": "faststart"}),
    ("libx265", "matroska", {}),
    ("libvpx-vp9", "webm", {}),
    ("libvpx-vp9", "mp4", {"movflags": "faststart"}),
    ("libsvtav1", "webm", {}),
    ("libsvtav1", "mp4", {"movflags": "faststart"}),
    ("mpeg4", "avi", {}),
    ("mpeg4", "mov", {"movflags": "faststart"}),
    ("mjpeg", "avi", {}),
    ("wmv2", "asf", {}),
]
NAMES = [f"{codec}-{form}{'-' + options['movflags'][:4] if options else ''}" for codec, form, options in HEALTHY]


def clip(
    codec: str = "libx264",
    form: str = "mp4",
    options: dict[str, str] | None = None,
    frames: int = 20,
    rate: int = 24,
    gaps: tuple[int, ...] = (),
    late: int = 0,
    sound: bool = False,
    turn: tuple[int, bool] = (0, False),
    pictures: list[Image.Image] | None = None,
    layout: str = "yuv420p",
) -> bytes:
    """A video that PyAV makes; `gaps`: milliseconds between frames, in turn; `late`: its first frame, in seconds."""
    file = Path(tempfile.mkdtemp(), "clip")  # an mp4 is read again to bring its index to the front
    with av.open(str(file), "w", format=form, options=options or {}) as container:
        video = container.add_stream(codec, rate=rate, options=QUICK.get(codec, {}))
        video.width, video.height = SIZE
        video.pix_fmt = "yuvj420p" if codec == "mjpeg" else layout
        video.set_display_rotation(turn[0], hflip=turn[1]) if turn != (0, False) else None
        unit = Fraction(1, 1000) if gaps else Fraction(1, rate)
        video.codec_context.time_base = unit
        voice = container.add_stream("aac", rate=48000, layout="mono") if sound else None
        time = int(late / unit)
        for index in range(frames):
            shown = np.roll(GROUND, index * 3, axis=1) if pictures is None else np.asarray(pictures[index])
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(shown), "rgba" if shown.shape[2] == 4 else "rgb24")
            frame.pts, frame.time_base = time, unit
            time += gaps[index % len(gaps)] if gaps else 1
            container.mux(video.encode(frame))
        container.mux(video.encode())
        for place in range(100 if voice is not None else 0):
            part = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            part.sample_rate, part.pts = 48000, place * 1024
            container.mux(voice.encode(part))  # type: ignore[union-attr]
        if voice is not None:
            container.mux(voice.encode(None))
    content = file.read_bytes()
    shutil.rmtree(file.parent)
    return content


@cache
def healthy(number: int) -> bytes:
    codec, form, options = HEALTHY[number]
    return clip(codec, form, options)


def probed(tmp_path: Path, content: bytes) -> Any:
    file = tmp_path / "x.mp4"
    file.write_bytes(content)
    return probe_video(file)


# --- whole or not -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(HEALTHY)), ids=NAMES)
def test_whole_clips_are_taken(tmp_path: Path, number: int) -> None:
    found = probed(tmp_path, healthy(number))
    assert found[1:] == (*SIZE, "20", None, "rate=24")


@pytest.mark.parametrize("number", range(len(HEALTHY)), ids=NAMES)
def test_no_cut_is_taken(tmp_path: Path, number: int) -> None:
    """At forty places and in the last bytes; most are seen without decoding anything."""
    content = healthy(number)
    size = len(content)
    for end in [*(size * part // 41 for part in range(1, 41)), size - 9, size - 2, size - 1]:
        found = probed(tmp_path, content[:end])
        assert found.problem is not None, f"{end} of {size} bytes gave {found.text} frames"


def test_a_cut_says_what_is_missing(tmp_path: Path) -> None:
    content = healthy(1)
    end = len(content) * 2 // 3
    assert probed(tmp_path, content[:end]).problem == (
        f"is cut off: its container says {len(content):,} bytes, the file has {end:,}"
    )


@pytest.mark.parametrize("number", range(len(HEALTHY)), ids=NAMES)
def test_containers_say_how_long_they_are(number: int) -> None:
    content = healthy(number)
    assert said_bytes(BytesIO(content), len(content)) == len(content)
    longer = content + b"\0\0\0something else"
    assert said_bytes(BytesIO(longer), len(longer)) <= len(longer), "what follows a whole clip is no cut"


def test_odd_but_whole_clips_are_taken(tmp_path: Path) -> None:
    """Sound that goes on, a late start, a live stream of unknown length, a box that goes on to the end."""
    fast = {"movflags": "faststart"}
    box = healthy(1)
    place = box.index(b"mdat") - 4
    cases = {
        "sound": clip(options=fast, sound=True),
        "sound in mkv": clip(form="matroska", sound=True),
        "late": clip(options=fast, late=3),
        "late mkv": clip(form="matroska", late=3),
        "live": clip(form="matroska", options={"live": "1"}),
        "to the end": box[:place] + bytes(4) + box[place + 4 :],
        "one frame": clip(frames=1),
        "transport stream": clip(form="mpegts"),
        "program stream": clip("mpeg2video", "mpeg"),
    }
    for name, content in cases.items():
        found = probed(tmp_path, content)
        assert (found.problem, found.text) == (None, "1" if name == "one frame" else "20"), name
    whole = cases["to the end"]
    with av.open(BytesIO(whole)) as container:
        ends = sorted(entry.pos + entry.size for entry in container.streams.video[0].index_entries)
    assert probed(tmp_path, whole[: ends[12]]).problem == "is cut off: it has 13 of the 20 frames that it lists"
    assert "damaged" in probed(tmp_path, whole[: ends[12] - 9]).problem


@pytest.mark.parametrize("number", [1, 4, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], ids=lambda number: NAMES[number])
def test_a_tail_of_zeros_is_found(tmp_path: Path, number: int) -> None:
    """Downloads that take their place on disk first have their whole length from the start."""
    content = healthy(number)
    end = len(content) * 2 // 3
    assert probed(tmp_path, content[:end] + bytes(len(content) - end)).problem is not None


@pytest.mark.parametrize("number", [1, 3, 7, 10, 12, 14], ids=lambda number: NAMES[number])
def test_edit_lists_take_frames_out_and_are_no_cut(tmp_path: Path, number: int) -> None:
    content = bytearray(healthy(number))
    place = content.index(b"elst") + 12
    length, start = struct.unpack_from(">Ii", content, place)
    (unit,) = struct.unpack_from(">I", content, content.index(b"mdhd") + 16)
    for trimmed, frames in (((length // 2, start), 10), ((length, start + unit // 3), 12), ((length * 2, start), 20)):
        struct.pack_into(">Ii", content, place, *trimmed)
        found = probed(tmp_path, bytes(content))
        assert found.problem is None
        assert abs(int(found.text) - frames) <= 1
        view = Fit(SIZE, SIZE, SIZE).centre
        count = int(found.text)
        assert read_clip(str(tmp_path / "x.mp4"), found.digest, Clip(0, count, None, 24.0), view).shape[1] == count


def test_damage_inside_is_found(tmp_path: Path) -> None:
    content = bytearray(clip(frames=40))
    place = content.index(b"mdat") + 4
    middle = place + (content.index(b"moov") - place) // 2
    content[middle : middle + 200] = bytes(range(200))
    assert "damaged" in str(probed(tmp_path, bytes(content)).problem)


@pytest.mark.parametrize(
    "content",
    [
        b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile 'a.mp4'\n",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    ],
)
def test_a_playlist_is_no_video(tmp_path: Path, content: bytes) -> None:
    """It would make FFmpeg read other files and addresses."""
    (tmp_path / "a.mp4").write_bytes(healthy(0))
    with bounded(5):
        assert "cannot be decoded" in str(probed(tmp_path, content).problem)


@pytest.mark.parametrize("kind", ["fifo", "zero"])
def test_a_pipe_is_no_video(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "f.mp4"
    os.mkfifo(file) if kind == "fifo" else file.symlink_to("/dev/zero")
    with bounded(2):
        assert (
            probe_video(file).problem
            == f"cannot be read: it is a {'named pipe' if kind == 'fifo' else 'device'}, not a file"
        )


# --- rates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["mp4", "matroska", "flv"])
def test_the_rate_is_that_of_the_frames(tmp_path: Path, form: str) -> None:
    assert probed(tmp_path, clip(form=form, rate=60)).facts == "rate=60"
    assert probed(tmp_path, clip(form=form, gaps=(20, 60, 40), frames=31)).facts == "variable rate=25"
    assert probed(tmp_path, clip(form=form, gaps=(41, 42, 42), frames=30)).facts.startswith("rate=2"), "only rounded"


@pytest.fixture
def rated(family_place: Make) -> Callable[..., list[str]]:
    """Clips by name and keys of their source → the notes on the dataset."""

    def make(clips: dict[str, bytes], **source: Any) -> list[str]:
        place = family_place("hunyuan_video")
        (place.folder / "clips").mkdir()
        for name, content in clips.items():
            (place.folder / "clips" / f"{name}.mp4").write_bytes(content)
            (place.folder / "clips" / f"{name}.txt").write_text(f"thing {name} moves")
        keys = {"path": "clips", "kind": "video", "target_frames": [9], **source}
        place.write(
            {
                "network": {"rank": 2},
                "training": {"max_train_steps": 4},
                "dataset": {"held_out": None, "sources": [keys]},
            }
        )
        return [note.render() for note in prepared(place.file).dataset_notes]

    return make


def test_frames_that_would_pass_slower_are_said(rated: Callable[..., list[str]]) -> None:
    clips = {"a": clip(rate=60), "b": clip(rate=24), "c": clip(rate=25)}
    assert rated(clips) == [
        "1 video of 60 fps is trained frame by frame at 24 fps, 2.5 times slower than it is (clips/a.mp4); "
        "source_fps = 60 drops frames"
    ]


def test_source_fps_is_held_against_the_file(rated: Callable[..., list[str]]) -> None:
    assert rated({"a": clip(rate=60, frames=40), "b": clip(rate=30, frames=40)}, source_fps=30) == [
        "1 video has another rate than source_fps = 30 says (clips/a.mp4 has 60); say their own rate; a source for each rate, "
        "where they have several"
    ]


def test_uneven_frames_are_said(rated: Callable[..., list[str]]) -> None:
    assert rated({"c": clip(gaps=(20, 60, 40), frames=40)}) == [
        "1 video has frames at uneven times, and is trained as if these were even (clips/c.mp4, 25 fps in the mean); make "
        "it even first: ffmpeg -i IN -fps_mode cfr -r 24 OUT"
    ]


# --- how it stands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["mp4", "mov", "matroska"])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_the_whole_display_matrix_counts(tmp_path: Path, form: str, degrees: int, mirrored: bool) -> None:
    file = tmp_path / "x.mp4"
    file.write_bytes(clip(form=form, frames=3, turn=(degrees, mirrored), pictures=[Image.fromarray(GROUND)] * 3))
    wanted = Image.fromarray(GROUND).rotate(degrees, expand=True)
    wanted = ImageOps.mirror(wanted) if mirrored else wanted
    with open_video(str(file)) as container:
        shown = frame_picture(next(video_frames(container)))
    assert shown.size == wanted.size
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(wanted)).mean() < 30
    found = probe_video(file)
    assert (found.width, found.height) == wanted.size
    assert ("mirrored" in found.facts) == mirrored
    pixels = read_clip(
        str(file), found.digest, Clip(0, 1, None, 24.0), Fit(wanted.size, wanted.size, wanted.size).centre
    )
    assert pixels.shape == (3, 1, wanted.size[1], wanted.size[0])


def test_a_crooked_matrix_is_refused(tmp_path: Path) -> None:
    stream = BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        video = container.add_stream("mpeg4", rate=24)
        video.width, video.height, video.pix_fmt = *SIZE, "yuv420p"
        video.set_display_matrix([46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30])
        container.mux(video.encode(av.VideoFrame.from_ndarray(GROUND, "rgb24")))
        container.mux(video.encode())
    found = probed(tmp_path, stream.getvalue())
    assert found.problem == "is turned by its display matrix, and not by a right angle or a mirror"


@pytest.mark.parametrize(("codec", "form", "layout"), [("qtrle", "mov", "argb"), ("libvpx-vp9", "webm", "yuva420p")])
def test_transparency_of_clips_stands_on_white(tmp_path: Path, codec: str, form: str, layout: str) -> None:
    half = np.zeros((SIZE[1], SIZE[0], 4), np.uint8)
    half[:, :32] = (200, 50, 50, 255)
    file = tmp_path / "x.mov"
    file.write_bytes(clip(codec, form, frames=2, pictures=[Image.fromarray(half)] * 2, layout=layout))
    found = probe_video(file)
    assert found.facts == "transparent rate=24"
    pixels = read_clip(str(file), found.digest, Clip(0, 2, None, 24.0), Fit(SIZE, SIZE, SIZE).centre)
    assert pixels[:, :, 8:40, 40:].min() == 1
    assert pixels[1, :, 8:40, 4:24].max() < -0.4


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "interlaced",
            "1 video is interlaced: each frame has lines of two moments (clips/a.mp4); ffmpeg -i IN -vf yadif OUT",
        ),
        (
            "oblong",
            "1 video has pixels that are not square, and is trained as stored (clips/a.mp4); ffmpeg -i IN -vf "
            "scale=iw*sar:ih,setsar=1 OUT",
        ),
        (
            "hdr",
            "1 video is HDR, and looks pale, read as usual ones (clips/a.mp4); map it first: ffmpeg with "
            "zscale and tonemap",
        ),
    ],
)
def test_what_a_screen_would_show_otherwise_is_said(
    tmp_path: Path, rated: Callable[..., list[str]], word: str, said: str
) -> None:
    file = tmp_path / "made.mp4"
    with av.open(str(file), "w") as container:
        interlaced = {"flags": "+ilme+ildct"}
        video = container.add_stream(
            "mpeg2video" if word == "interlaced" else "libx264",
            rate=24,
            options=interlaced if word == "interlaced" else {},
        )
        video.width, video.height, video.pix_fmt = *SIZE, "yuv420p"
        if word == "oblong":
            video.codec_context.sample_aspect_ratio = Fraction(4, 3)
        if word == "hdr":
            video.codec_context.color_trc = 18
        for index in range(20):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.roll(GROUND, index, axis=1).copy(), "rgb24")))
        container.mux(video.encode())
    assert probe_video(file).facts == f"{word} rate=24"
    assert rated({"a": file.read_bytes()}) == [said]


# --- folders of frames ------------------------------------------------------------------------------------------------


def frames_place(family_place: Make, names: list[str], sizes: dict[str, tuple[int, int]] | None = None) -> Place:
    place = family_place("hunyuan_video")
    folder = place.folder / "listed"
    (folder / "frames").mkdir(parents=True)
    for number, name in enumerate(names):
        Image.new("RGB", (sizes or {}).get(name, SIZE), (number * 10, 0, 0)).save(folder / "frames" / name)
    (folder / "list.jsonl").write_text(json.dumps({"video_path": "frames", "caption": "a thing"}))
    place.write(
        {
            "network": {"rank": 2},
            "training": {"max_train_steps": 4},
            "dataset": {
                "held_out": None,
                "sources": [{"path": "listed/list.jsonl", "kind": "video", "frame_extraction": "full"}],
            },
        }
    )
    return place


def test_frames_follow_their_numbers(family_place: Make) -> None:
    """1, 2, 10; not 1, 10, 2."""
    names = [f"frame {number}.png" for number in range(1, 14)]
    place = frames_place(family_place, names)
    assert frame_names(str(place.folder / "listed" / "frames")) == names
    item = prepared(place.file).collection.items[0]
    assert item.clip is not None
    pixels = read_clip(item.path, item.digest, item.clip, item.fit.centre)
    shown = [round(float(value)) for value in (pixels[0].mean(dim=(1, 2)) + 1) * 127.5]
    assert shown == [number * 10 for number in range(13)]


def test_a_frame_of_another_size_is_named(family_place: Make) -> None:
    place = frames_place(family_place, [f"{number}.png" for number in range(9)], {"7.png": (48, 64)})
    with pytest.raises(InvalidConfig) as raised:
        prepared(place.file)
    assert (
        "list/frames has frames of several sizes: 7.png is 48x64, the first, 0.png, is 64x48"
        in raised.value.diagnostics[0].message
    )


def test_a_video_that_changes_its_size_is_named(tmp_path: Path) -> None:
    """Two program streams after each other."""
    parts = []
    for size in (SIZE, (96, 64)):
        stream = BytesIO()
        with av.open(stream, "w", format="mpeg") as container:
            video = container.add_stream("mpeg2video", rate=24)
            video.width, video.height, video.pix_fmt = *size, "yuv420p"
            for index in range(6):
                frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), index * 9, np.uint8), "rgb24")
                container.mux(video.encode(frame))
            container.mux(video.encode())
        parts.append(stream.getvalue())
    assert "changes its size: frame 5 is 96x64, the first 64x48" in str(probed(tmp_path, b"".join(parts)).problem)


def test_frames_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder only those that are wanted; of a video those up to the last that is wanted."""
    import runner.data.videos as videos

    folder = tmp_path / "frames"
    draw_pictures(folder, 30)
    (folder / "captions").mkdir(exist_ok=True)
    names = frame_names(str(folder))
    import hashlib

    digest = hashlib.sha256(
        "\n".join(hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names).encode()
    ).hexdigest()
    opened = []
    real = videos.pictures.read_picture
    monkeypatch.setattr(videos.pictures, "read_picture", lambda file: opened.append(file) or real(file))
    read_clip(str(folder), digest, Clip(20, 5, None, 24.0), Fit((32, 32), (32, 32), (32, 32)).centre)
    assert len(opened) == 5
