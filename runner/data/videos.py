"""Videos through PyAV: clips to pixels, one frame at a time, and pixels to mp4."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from runner import pictures
from runner.data.images import to_pixels, transformed
from runner.dataset.buckets import View
from runner.dataset.clips import Clip, kept_frames
from runner.dataset.frames import MOST_BYTES, UnusableVideo, frame_names, frame_picture, open_video, video_frames
from runner.errors import RunFailed
from runner.files import open_regular, read_bytes

LARGE = 2**31 - 1


def read_clip(path: str, digest: str, clip: Clip, view: View) -> Tensor:
    """fp32 [3, T, H, W] in -1..1. Raises `RunFailed` where the file is no longer the one that was planned with."""
    return next(read_clips(path, digest, [(clip, view)]))[1]


def read_clips(path: str, digest: str, wanted: Sequence[tuple[Clip, View]]) -> Iterator[tuple[int, Tensor]]:
    """(place in `wanted`, fp32 [3, T, H, W] in -1..1) of each clip of one file, in the order in which they end.

    The file is decoded once for all of them. Frames are resized as they come, and go with the last clip that has them:
    memory grows with the longest clip, not with the video. Raises `RunFailed` where the file is no longer the one that was
    planned with.
    """
    users = _users(wanted)
    found: dict[int, list[Tensor]] = {place: [] for place in range(len(wanted))}
    for index, frame in enumerate(_frames(path, digest) if users else ()):
        if index in users:
            picture, seen = frame(), {}
            for place in users.pop(index):
                clip, view = wanted[place]
                if view not in seen:
                    seen[view] = to_pixels(transformed(picture, view))
                found[place].append(seen[view])
                if len(found[place]) == clip.length:
                    yield place, torch.from_numpy(np.stack([own.numpy() for own in found.pop(place)], axis=1))
        if not users:
            break
    for place, frames in found.items():
        length = wanted[place][0].length
        raise RunFailed(f"{path} has only {len(frames)} of the {length} frames of its clip", hint="apply again")


def _users(wanted: Sequence[tuple[Clip, View]]) -> dict[int, list[int]]:
    """Frame of the file → the clips that have it."""
    users: dict[int, list[int]] = {}
    for rates in {(clip.source_fps, clip.target_fps) for clip, _ in wanted}:
        own = {place: clip for place, (clip, _) in enumerate(wanted) if (clip.source_fps, clip.target_fps) == rates}
        kept = list(islice(kept_frames(LARGE, *rates), max(clip.start + clip.length for clip in own.values())))
        for place, clip in own.items():
            for index in kept[clip.start : clip.start + clip.length]:
                users.setdefault(index, []).append(place)
    return users


def _frames(path: str, digest: str) -> Iterator[Callable[[], Image.Image]]:
    """The frames of a video or of a folder of pictures; each is made a picture when it is asked for."""
    if os.path.isdir(path):
        yield from _sequence(path, digest)
        return
    import av

    try:
        with open_regular(path, MOST_BYTES) as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                raise _changed(path)
        with open_video(path) as container:
            for frame in video_frames(container):
                yield partial(frame_picture, frame)
    except (OSError, av.FFmpegError, UnusableVideo) as error:
        raise RunFailed(f"{path} cannot be read any more: {error}", hint="apply again") from None


def _sequence(folder: str, digest: str) -> Iterator[Callable[[], Image.Image]]:
    try:
        files = [Path(folder, name) for name in frame_names(folder)]
        contents = [hashlib.sha256(read_bytes(file, pictures.MOST_BYTES)).hexdigest() for file in files]
        if hashlib.sha256("\n".join(contents).encode()).hexdigest() != digest:
            raise _changed(folder)
        for file in files:
            yield partial(pictures.read_picture, file)
    except OSError as error:
        raise RunFailed(f"{folder} cannot be read any more: {error}", hint="apply again") from None


def _changed(path: str) -> RunFailed:
    return RunFailed(f"{path} changed while the run was going on", hint="apply again: the plan takes the new content")


_FROM_RGB = np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]]) / 255
"""BT.601 of a television's range."""
_SMPTE170M = 6


def mp4_bytes(pixels: Tensor, fps: float) -> bytes:
    """H.264 of [3, T, H, W] in -1..1 (clipped); sides are even. One thread and no date, so that equal pixels give equal
    bytes; for the same reason colours are converted here (swscale rounds by where its memory lies) and x264 does without
    its macroblock tree (small pictures come out differently from one time to the next)."""
    import av

    values = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
    stream = BytesIO()
    with av.open(stream, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        video = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        video.width, video.height, video.pix_fmt = values.shape[2], values.shape[1], "yuv420p"
        video.options = {"crf": "16", "x264-params": "threads=1:no-mbtree=1"}
        video.thread_count = 1
        context = video.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _SMPTE170M
        context.color_range = 1
        for frame in values:
            for packet in video.encode(av.VideoFrame.from_ndarray(_yuv420(frame), format="yuv420p")):
                container.mux(packet)
        for packet in video.encode():
            container.mux(packet)
    return stream.getvalue()


def _yuv420(frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """[H * 3 / 2, W]: the planes of brightness and of both colours below each other, from RGB [H, W, 3]."""
    height, width, _ = frame.shape
    wide = frame.astype(np.float64) @ _FROM_RGB.T
    light = wide[..., 0] + 16
    colours = wide[..., 1:].reshape(height // 2, 2, width // 2, 2, 2).mean(axis=(1, 3)) + 128
    planes = [light.reshape(-1), colours[..., 0].reshape(-1), colours[..., 1].reshape(-1)]
    return np.concatenate(planes).round().astype(np.uint8).reshape(height * 3 // 2, width)
