"""cache.latents and cache.text: the encodings that later stages read from the store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import ClassVar

from runner.dataset.item_facts import COLUMNS, column_facts
from runner.inputs.cache import CACHE_VERSION, CachedItems, LatentsInputs, TextsInputs
from runner.inputs.train import settings_of
from runner.plan.compile import Graph, Run
from runner.plan.diff import Plan, Planning
from runner.plan.stage import Action, Reads, Stage, joined

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
ITEM_OVERHEAD = 232
"""Bytes of header and checksum around an encoded item."""
_NOT_STORED = {"memory": "encoded at each start and held in memory", "off": "encoded at each use"}


def _items(run: Run, varies: bool, place: str, batch_size: int) -> CachedItems:
    measured = (*run.prepared.collection.held_out, *run.compared)
    facts = column_facts(measured, COLUMNS, run.prepared.known_after)
    return CachedItems(
        trained=run.item_facts,
        measured=facts,
        seed=run.config.run.seed,
        varies=varies,
        place=place,
        batch_size=batch_size,
    )


def _action(
    name: str, kind: str, place: str, keys: Iterable[str], nouns: tuple[str, str], planning: Planning
) -> Action:
    """What there is to encode of what is read now."""
    if place != "disk":
        return Action(node=name, symbol="=", summary=_NOT_STORED[place])
    if not planning.readers():
        return Action(node=name, symbol="=", summary="not needed: what follows is done")
    wanted = list(dict.fromkeys(keys))
    present = planning.store.index.item_keys(kind)
    lacking = [key for key in wanted if key not in present]
    missing, total = len(lacking), len(wanted)
    if missing == 0:
        return Action(node=name, symbol="=", summary=f"all {total} {nouns[1]} are encoded", total=total)
    if missing == total:
        summary = f"encode {total} {nouns[total != 1]}"
    else:
        summary = f"encode {missing} of {total} {nouns[1]}, reuse {total - missing}"
    reasons = planning.store_reasons(name, kind, lacking)
    return Action(
        node=name,
        symbol="+" if missing == total else "~",
        summary=summary,
        reasons=reasons,
        total=total,
        missing=missing,
    )


def every_read(graph: Graph) -> Reads:
    """All that the stages of a graph may read."""
    return joined(node.stage.reads(node.inputs) for node in graph.nodes.values())


class Latents(Stage[LatentsInputs]):
    """Pictures and clips, encoded."""

    name = "cache.latents"
    version = CACHE_VERSION
    alias = "cache"
    address = "runner.stages.encodings:run_latents"
    again = "pictures are encoded again"
    locked = True
    makes: ClassVar[tuple[str, ...]] = ("latents",)

    def inputs(self, run: Run) -> LatentsInputs:
        varies = any(own.look.varies for own in settings_of(run.prepared.collection.items))
        items = _items(run, varies, run.runtime.latents, run.runtime.latent_batch_size)
        return LatentsInputs(run.latent_encoder, items)

    def pending(self, inputs: LatentsInputs, planning: Planning) -> Action:
        keys = self._keys(inputs, planning.reads())
        return _action(self.name, "latents", inputs.items.place, keys, self._nouns(planning), planning)

    def _keys(self, inputs: LatentsInputs, reads: Reads) -> Iterable[str]:
        size = inputs.items.batch_size
        return (inputs.encoder.key(item.picture, view, size) for item, view in reads.views)

    def _nouns(self, planning: Planning) -> tuple[str, str]:
        """What the items are, one and several."""
        kinds = {item.clip is not None for item in planning.prepared.collection.items}
        if kinds == {True}:
            return "clip", "clips"
        return ("picture", "pictures") if kinds <= {False} else ("picture or clip", "pictures and clips")

    def keys(self, inputs: LatentsInputs, graph: Graph) -> Mapping[str, Iterable[str]]:
        return {"latents": self._keys(inputs, every_read(graph))}

    def disk(self, inputs: LatentsInputs, plan: Plan) -> Mapping[str, int]:
        """Each of the mean size of all items."""
        model, items = plan.prepared.model, plan.prepared.collection.items
        missing = plan.actions[self.name].missing
        if not missing or not items:
            return {"latents": 0}
        frames = {id(item): (item.clip.length - 1) // model.frame_factor + 1 for item in items if item.clip is not None}
        areas = [prod(item.fit.bucket) * (frames.get(id(item), 1) + len(item.pictures)) for item in items]
        image = 0
        if model.image_tokens:
            image = model.image_tokens * int(model.components["image_encoder"].config["hidden_size"])
        numbers = sum(areas) / len(items) / model.latent_factor**2 * model.latent_channels + image
        return {"latents": int(missing * (numbers * BYTES[inputs.encoder.stored_dtype] + ITEM_OVERHEAD))}


class Texts(Stage[TextsInputs]):
    """Captions, encoded."""

    name = "cache.text"
    version = CACHE_VERSION
    alias = "cache"
    address = "runner.stages.encodings:run_texts"
    again = "captions are encoded again"
    locked = True
    makes: ClassVar[tuple[str, ...]] = ("text",)

    def inputs(self, run: Run) -> TextsInputs:
        varies = any(own.captions.varies for own in settings_of(run.prepared.collection.items))
        return TextsInputs(run.text_encoder, _items(run, varies, run.runtime.texts, run.runtime.text_batch_size))

    def pending(self, inputs: TextsInputs, planning: Planning) -> Action:
        keys = self._keys(inputs, planning.reads().texts)
        return _action(self.name, "text", inputs.items.place, keys, ("caption", "captions"), planning)

    def _keys(self, inputs: TextsInputs, texts: Sequence[str]) -> Iterable[str]:
        return (inputs.encoder.key(text, inputs.items.batch_size) for text in texts)

    def keys(self, inputs: TextsInputs, graph: Graph) -> Mapping[str, Iterable[str]]:
        return {"text": self._keys(inputs, every_read(graph).texts)}

    def disk(self, inputs: TextsInputs, plan: Plan) -> Mapping[str, int]:
        model, missing = plan.prepared.model, plan.actions[self.name].missing
        numbers = model.text_tokens * model.text_width + model.text_extra
        return {"text": int(missing * (numbers * BYTES[inputs.encoder.stored_dtype] + ITEM_OVERHEAD))}


LATENTS, TEXTS = Latents(), Texts()
