"""cache.latents and cache.text: encode what is missing in the store, one item at a time as far as anyone can tell."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from runner.data.images import PictureRequest
from runner.data.items import write_item
from runner.errors import Stopped
from runner.inputs import LatentEncoder, TextEncoder
from runner.stages.context import Context
from runner.stages.encode import LatentEncoding, TextEncoding


def encode_pictures(
    context: Context, encoder: LatentEncoder, wanted: dict[str, PictureRequest]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Key → encoding of each wanted picture. Batches hold one size; pictures are read ahead of their batch."""
    encoding = LatentEncoding(context, encoder)
    size = context.runtime.latent_batch_size
    by_bucket: dict[tuple[tuple[int, int], int], list[str]] = {}
    for key, request in wanted.items():
        frames = request.clip.length if request.clip is not None else 0
        by_bucket.setdefault((request.view.bucket, frames), []).append(key)
    batches = [keys[i : i + size] for _, keys in sorted(by_bucket.items()) for i in range(0, len(keys), size)]
    with ThreadPoolExecutor(max_workers=max(1, context.runtime.workers)) as pool:
        ahead: deque[list[Future[Tensor]]] = deque()
        for position, keys in enumerate(batches):
            while len(ahead) < 3 and position + len(ahead) < len(batches):
                ahead.append([pool.submit(wanted[key].pixels) for key in batches[position + len(ahead)]])
            pixels = [future.result() for future in ahead.popleft()]
            yield from zip(keys, encoding.encode([wanted[key] for key in keys], pixels, size), strict=True)


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
    """Writes encodings to the store as they come and returns how many. Raises `Stopped` when asked to stop."""
    index = context.store.index
    written: list[tuple[str, int]] = []
    done = 0
    for key, encoding in encodings:
        written.append((key, write_item(context.store, kind, key, encoding)))
        done += 1
        if len(written) >= 64:
            index.add_items(kind, written)
            written = []
            context.events.emit("progress", done=done, total=total)
        if context.stop.is_set():
            index.add_items(kind, written)
            raise Stopped(f"stopped while encoding: {done} of {total} are kept", context.stop.code)
    index.add_items(kind, written)
    context.events.emit("progress", done=done, total=total)
    return done
