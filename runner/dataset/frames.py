"""The frames of videos and of folders of pictures: opened, upright, in order. What is planned and what is encoded read them
alike; torch-free."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from PIL import Image

from runner.dataset.containers import said_bytes
from runner.media import is_media
from runner.pictures import MIRRORED, TRANSPARENT, alpha_of, as_rgb

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.codeccontext import VideoCodecContext
    from av.video.stream import VideoStream

MOST_BYTES = 2**36
"""Of one video's file."""
MOST_PIXELS = 2**26
"""Of one frame."""
VARIABLE, INTERLACED, OBLONG, HDR, GAPS = "variable", "interlaced", "oblong", "hdr", "gaps"
"""Facts of a video, beside those of pictures and `rate=FPS`: frames at uneven times; of lines of two times; pixels that are
not square; brightness on a scale that screens have to be told of (PQ, HLG); a folder's frames whose numbers do not go on
evenly."""
_HDR_CURVES = (16, 18)
_FORMATS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf"
"""No playlists and no scripts: those name other files and addresses to read."""
_TURNS = {
    (1, 0, 0, 1): None,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
"""What a display matrix (a, b, c, d) does: a point (x, y) is shown at (ax + cy, bx + dy)."""


class UnusableVideo(Exception):
    """Why a video cannot be trained on: "is cut off: …"."""


@dataclass
class VideoFacts:
    """What decoding a video told."""

    size: tuple[int, int] = (0, 0)
    """Upright (width, height)."""
    frames: int = 0
    words: list[str] = field(default_factory=list)


def open_video(path: str) -> InputContainer:
    """A video's container. The file is one that `open_regular` has opened before."""
    import av

    return av.open(f"file:{path}", options={"format_whitelist": _FORMATS, "protocol_whitelist": "file"})


def video_frames(container: InputContainer) -> Iterator[av.VideoFrame]:
    """The decoded frames, as stored."""
    stream = container.streams.video[0]
    decoder = _decoder(stream)
    decoder.thread_type = "AUTO"
    for packet in container.demux(stream):
        yield from decoder.decode(packet)


def _decoder(stream: VideoStream) -> VideoCodecContext:
    """What decodes a stream. FFmpeg's own decoders of VP8 and VP9 leave transparency out, libvpx does not."""
    from av.video.codeccontext import VideoCodecContext

    own = stream.codec_context
    if stream.metadata.get("alpha_mode") != "1" or own.name not in ("vp8", "vp9"):
        return own
    decoder = VideoCodecContext.create("libvpx" if own.name == "vp8" else "libvpx-vp9", "r")
    decoder.extradata = own.extradata
    return decoder


def frame_names(folder: str) -> list[str]:
    """The pictures of a folder in the natural order of their numbers: 1, 2, 10."""
    return sorted((name for name in os.listdir(folder) if is_media(name, "image")), key=_natural)


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), "") if index % 2 else (0, part) for index, part in enumerate(parts)], name


def frame_facts(names: list[str]) -> list[str]:
    """What the names of a folder's frames, in their order, tell: that numbers are left out or stand twice."""
    numbers = [[int(part) for part in re.findall(r"[0-9]+", os.path.splitext(name)[0])] for name in names]
    if len({len(own) for own in numbers}) > 1:
        return []
    counting = [column for column in zip(*numbers, strict=True) if len(set(column)) > 1]
    if len(counting) != 1:
        return []
    return [GAPS] if len({after - before for before, after in pairwise(counting[0])}) > 1 else []


def frame_picture(frame: av.VideoFrame) -> Image.Image:
    """A frame as it is shown: upright, RGB, on the ground of transparent pictures."""
    turn = _turn(frame)
    picture = as_rgb(_seen_through(frame)) if _has_alpha(frame) else frame.to_image()
    return picture if turn is None else picture.transpose(turn)


def read_video(stream: BinaryIO, path: str) -> VideoFacts:
    """Decodes a whole video, one frame at a time: what containers say of their frames is often wrong. Raises
    `UnusableVideo`."""
    import av

    size = os.fstat(stream.fileno()).st_size
    if size == 0:
        raise UnusableVideo("is empty")
    stream.seek(0)
    said = said_bytes(stream, size)
    if said > size:
        raise UnusableVideo(f"is cut off: its container says {said:,} bytes, the file has {size:,}")
    found = VideoFacts()
    try:
        with open_video(path) as container:
            if not container.streams.video:
                raise UnusableVideo("has no video stream")
            _decode(container, found)
    except (av.FFmpegError, ValueError, MemoryError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnusableVideo(f"cannot be decoded after frame {found.frames}: {reason}") from None
    if found.frames == 0:
        raise UnusableVideo("has no frames")
    return found


def _decode(container: InputContainer, found: VideoFacts) -> None:
    stream = container.streams.video[0]
    if cast(Any, stream.codec_context) is None:
        raise UnusableVideo("is of a codec that nothing here decodes")
    decoder = _decoder(stream)
    decoder.thread_type = "SLICE"  # threads of whole frames lose the decoder's errors
    decoder.options = {"max_pixels": str(MOST_PIXELS)}
    if stream.sample_aspect_ratio not in (None, 0, 1):
        found.words.append(OBLONG)
    unit = float(stream.time_base or 0)
    times: list[int | None] = []
    shown: list[int | None] = []
    packets, end = 0, 0.0
    for packet in container.demux():
        time = packet.pts if packet.pts is not None else packet.dts
        if time is not None and packet.time_base:
            end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
        if packet.stream.index != stream.index:  # (stream_index of the last packets is not set)
            continue
        if packet.size:
            packets += 1
            if not packet.is_discard:  # outside of an edit list
                times.append(packet.pts)
        if packet.is_corrupt:
            raise UnusableVideo(f"is damaged after frame {found.frames}: a packet is not whole")
        for frame in decoder.decode(packet):
            _look(frame, found)
            shown.append(frame.pts)
    rate = _rate(times, unit, stream.average_rate, found.words)
    _end(container, packets, end, rate, found)
    known = [time for time in times if time is not None]
    if rate and known and None not in (*times, *shown) and max(shown) * unit < max(known) * unit - 2.5 / rate:  # type: ignore[type-var, operator]
        raise UnusableVideo(f"stops after frame {found.frames}: what follows cannot be decoded")
    if rate:
        found.words.append(f"rate={rate:.6g}")


def _end(container: InputContainer, packets: int, end: float, rate: float, found: VideoFacts) -> None:
    """Raises `UnusableVideo` where the container lists or says more than there is: the rest of its file may be zeros."""
    name = container.format.name
    listed = len(container.streams.video[0].index_entries) if name.startswith("mov") else 0
    if packets < listed:
        raise UnusableVideo(f"is cut off: it has {packets} of the {listed} frames that it lists")
    said = (container.duration or 0) / 1_000_000 if name.startswith(("matroska", "avi", "asf")) else 0.0
    if said > 1.02 * end + max(0.1, 3 / (rate or 24)):
        raise UnusableVideo(
            f"is cut off: its container says {said:.2f} seconds, and it ends after {end:.2f} (a wrong header is mended by "
            "ffmpeg -i IN -c copy OUT)"
        )


def _look(frame: av.VideoFrame, found: VideoFacts) -> None:
    """Counts a decoded frame; what there is to know of it joins the facts."""
    if frame.is_corrupt:
        raise UnusableVideo(f"is damaged at frame {found.frames}")
    turn = _turn(frame)
    swapped = turn is not None and turn >= Image.Transpose.ROTATE_90 and turn != Image.Transpose.ROTATE_180
    size = (frame.height, frame.width) if swapped else (frame.width, frame.height)
    if found.frames == 0:
        found.size = size
    elif size != found.size:
        raise UnusableVideo(
            f"changes its size: frame {found.frames} is {size[0]}x{size[1]}, the first {found.size[0]}x{found.size[1]}"
        )
    for word, holds in (
        (MIRRORED, turn in _MIRRORS),
        (INTERLACED, frame.interlaced_frame),
        (HDR, frame.color_trc in _HDR_CURVES),
    ):
        if holds and word not in found.words:
            found.words.append(word)
    if TRANSPARENT not in found.words and _has_alpha(frame) and alpha_of(_seen_through(frame)).getextrema()[0] != 255:
        found.words.append(TRANSPARENT)
    found.frames += 1


def _has_alpha(frame: av.VideoFrame) -> bool:
    return any(component.is_alpha for component in frame.format.components)


def _seen_through(frame: av.VideoFrame) -> Image.Image:
    """RGBA, as stored."""
    return Image.fromarray(frame.to_ndarray(format="rgba"))


_MIRRORS = (
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.TRANSVERSE,
)


def _turn(frame: av.VideoFrame) -> Image.Transpose | None:
    """What has to be done so that a frame stands as its display matrix says. Raises `UnusableVideo`."""
    data = cast(Any, frame.side_data).get("DISPLAYMATRIX")  # PyAV's types call it a dictionary of its own
    if data is None:
        return None
    values = struct.unpack("=9i", bytes(data)[:36])
    matrix = [values[index] for index in (0, 1, 3, 4)]
    most = max(abs(value) for value in matrix)
    if most == 0:
        return None
    signs = tuple(round(value / most) if abs(value) > most / 100 else 0 for value in matrix)
    if signs not in _TURNS:
        raise UnusableVideo("is turned by its display matrix, and not by a right angle or a mirror")
    return _TURNS[signs]


def _rate(times: list[int | None], unit: float, said: Fraction | None, words: list[str]) -> float:
    """Frames a second by the frames' times in units of so many seconds, or what the container says where that agrees or
    they are not known; 0: nobody knows. Whether they are uneven joins `words`."""
    known = sorted(time for time in times if time is not None)
    gaps = [after - before for before, after in pairwise(known)]
    if len(known) < len(times) or not gaps or unit == 0 or known[0] == known[-1]:
        return float(said or 0)
    usual = max(1, median(gaps))
    rounding = 1 if usual >= 3 else 0
    uneven = sum(1 for gap in gaps if abs(gap - usual) > 0.2 * usual + rounding)
    if uneven > max(1, len(gaps) // 100) or max(gaps) > 3 * usual + rounding:
        words.append(VARIABLE)
    elif said and abs(said * usual * unit - 1) < 0.02 + rounding / usual:
        return float(said)
    return len(gaps) / ((known[-1] - known[0]) * unit)
