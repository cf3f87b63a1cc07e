"""cache.latents and cache.text: encode what is missing in the store, one item at a time as far as anyone can tell."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice

from torch import Tensor

from runner.data.images import PictureRequest
from runner.data.items import write_item
from runner.errors import Stopped
from runner.inputs.cache import LatentEncoder, TextEncoder
from runner.stages.context import Context
from runner.stages.encode import LatentEncoding, TextEncoding

AHEAD = 3
"""Batches that are read ahead of the encoder."""
WAITING = 16
"""Encodings that wait to be written, at most."""


def encode_pictures(
    context: Context, encoder: LatentEncoder, wanted: dict[str, PictureRequest]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Key → encoding of each wanted picture or clip. Batches hold one size and length."""
    encoding = LatentEncoding(context, encoder)
    size = context.runtime.latent_batch_size
    filling: dict[tuple[tuple[int, int], int], list[tuple[str, Tensor]]] = {}

    def encoded(batch: list[tuple[str, Tensor]]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        keys = [key for key, _ in batch]
        found = encoding.encode([wanted[key] for key in keys], [pixels for _, pixels in batch], size)
        yield from zip(keys, found, strict=True)

    with ThreadPoolExecutor(max_workers=max(1, context.runtime.workers)) as pool:
        for key, pixels in read_ahead(pool, wanted, AHEAD * size):
            kind = _kind(wanted[key])
            if wanted[key].clip is None:  # pictures come by size: what is not full by now stays so
                for other in filling.keys() - {kind}:
                    yield from encoded(filling.pop(other))
            filling.setdefault(kind, []).append((key, pixels))
            if len(filling[kind]) == size:
                yield from encoded(filling.pop(kind))
    for kind in sorted(filling):
        yield from encoded(filling.pop(kind))


def _kind(request: PictureRequest) -> tuple[tuple[int, int], int]:
    """What is the same in a batch."""
    return request.view.bucket, request.clip.length if request.clip is not None else 0


def read_ahead(pool: Executor, wanted: Mapping[str, PictureRequest], room: int) -> Iterator[tuple[str, Tensor]]:
    """Key → pixels, read in the pool `room` files ahead. Pictures come by size; clips file by file, since a file is
    decoded once for all its clips."""
    files: dict[tuple[str, str], list[str]] = {}
    for key, request in sorted(wanted.items(), key=lambda entry: _kind(entry[1])):
        files.setdefault((request.path, request.digest) if request.clip is not None else (key, ""), []).append(key)
    waiting = iter(files.values())
    opened: deque[tuple[int, Iterator[tuple[str, Tensor]], Future[tuple[str, Tensor]]]] = deque()

    def begin(count: int) -> None:
        for keys in islice(waiting, count):
            reader = _reader({key: wanted[key] for key in keys})
            opened.append((len(keys), reader, pool.submit(next, reader)))

    begin(room)
    while opened:
        left, reader, coming = opened.popleft()
        found = coming.result()
        if left > 1:  # the file's next clip is decoded while this one is encoded
            opened.appendleft((left - 1, reader, pool.submit(next, reader)))
        else:
            begin(1)
        yield found


def _reader(wanted: Mapping[str, PictureRequest]) -> Iterator[tuple[str, Tensor]]:
    """Key → pixels of one picture, or of all clips of one file."""
    keys, first = list(wanted), next(iter(wanted.values()))
    if first.clip is None:
        yield keys[0], first.pixels()
        return
    from runner.data.videos import read_clips

    clips = [(request.clip, request.view) for request in wanted.values() if request.clip is not None]
    for place, pixels in read_clips(first.path, first.digest, clips):
        yield keys[place], pixels


def encode_texts(
    context: Context, encoder: TextEncoder, wanted: dict[str, str]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Key → encoding of each wanted text."""
    encoding = TextEncoding(context, encoder.stored_dtype)
    size = context.runtime.text_batch_size
    keys = list(wanted)
    for start in range(0, len(keys), size):
        chunk = keys[start : start + size]
        yield from zip(chunk, encoding.encode([wanted[key] for key in chunk], size), strict=True)


def store_encodings(context: Context, kind: str, total: int, encodings: Iterator[tuple[str, dict[str, Tensor]]]) -> int:
    """Writes encodings to the store as they come, with their digests, beside what encodes the next ones; returns how many.
    Raises `Stopped` when asked to stop."""
    store = context.store
    waiting: deque[tuple[str, Future[int]]] = deque()
    written: list[tuple[str, int]] = []
    done = 0

    def settle(room: int) -> None:
        """Waits until no more than `room` wait to be written."""
        nonlocal done
        while len(waiting) > room:
            key, size = waiting.popleft()
            written.append((key, size.result()))
            done += 1
            if len(written) == 64:
                note()

    def note() -> None:
        store.index.add_items(kind, written)
        written.clear()
        context.events.emit("progress", done=done, total=total)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="encodings") as pool:
        for key, encoding in encodings:
            waiting.append((key, pool.submit(write_item, store, kind, key, encoding)))
            settle(WAITING)
            if context.stop.is_set():
                settle(0)
                note()
                raise Stopped(f"stopped while encoding: {done} of {total} are kept", context.stop.code)
        settle(0)
    note()
    return done
