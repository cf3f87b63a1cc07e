"""Where a stage's encodings come from: the store, which the cache stages fill, this process's memory, or the encoder itself at
each use."""

from __future__ import annotations

from collections.abc import Iterable

from runner.data.images import PictureRequest
from runner.data.items import Encodings, HeldEncodings, StoredEncodings
from runner.dataset.buckets import View
from runner.dataset.encodings import TrainItem
from runner.inputs.cache import LatentEncoder, LatentsInputs, TextEncoder, TextsInputs
from runner.stages.cache import encode_pictures, encode_texts, store_encodings
from runner.stages.context import Context
from runner.stages.job import Job


class Latents:
    """Latents of views, under one encoder's settings."""

    def __init__(self, context: Context, encoder: LatentEncoder) -> None:
        self.context, self.encoder = context, encoder
        self.batch_size = context.runtime.latent_batch_size

    def key(self, digest: str, view: View) -> str:
        return self.encoder.key(digest, view, self.batch_size)

    def requests(self, views: Iterable[tuple[TrainItem, View]]) -> dict[str, PictureRequest]:
        return {self.key(item.picture, view): PictureRequest.of(item, view) for item, view in views}

    def ready(self, views: Iterable[tuple[TrainItem, View]]) -> Encodings:
        """All these views, from the store where they are kept on disk, else encoded now and held."""
        if self.context.runtime.latents == "disk":
            return StoredEncodings(self.context.store, "latents")
        held = HeldEncodings(dict(encode_pictures(self.context, self.encoder, self.requests(views))))
        self.context.free()
        return held


class Texts:
    """Conditioning of captions, under one encoder's settings."""

    def __init__(self, context: Context, encoder: TextEncoder) -> None:
        self.context, self.encoder = context, encoder
        self.batch_size = context.runtime.text_batch_size

    def key(self, text: str) -> str:
        return self.encoder.key(text, self.batch_size)

    def ready(self, texts: Iterable[str]) -> Encodings:
        """All these texts, from the store or encoded now."""
        if self.context.runtime.texts == "disk":
            return StoredEncodings(self.context.store, "text")
        wanted = {self.key(text): text for text in dict.fromkeys(texts)}
        held = HeldEncodings(dict(encode_texts(self.context, self.encoder, wanted)))
        self.context.free()
        return held


def run_latents(job: Job, inputs: LatentsInputs) -> None:
    """Encodes the views that are read and are not in the store."""
    if inputs.items.place != "disk":
        return
    context, kind = job.context, "latents"
    requests = Latents(context, inputs.encoder).requests(job.planning().reads().views)
    present = context.store.index.item_keys(kind)
    wanted = {key: request for key, request in requests.items() if key not in present}
    if wanted:
        context.events.emit("started", total=len(wanted))
        store_encodings(context, kind, len(wanted), encode_pictures(context, inputs.encoder, wanted))


def run_texts(job: Job, inputs: TextsInputs) -> None:
    """Encodes the texts that are read and are not in the store."""
    if inputs.items.place != "disk":
        return
    context, kind = job.context, "text"
    texts, present = Texts(context, inputs.encoder), context.store.index.item_keys(kind)
    wanted = {key: text for text in job.planning().reads().texts if (key := texts.key(text)) not in present}
    if wanted:
        context.events.emit("started", total=len(wanted))
        store_encodings(context, kind, len(wanted), encode_texts(context, inputs.encoder, wanted))
