"""What a run was when it was last applied. How the present one differs from that: plan/reasons.py."""

from __future__ import annotations

import gzip
import hashlib
import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from runner.atomic import copy_file, remove, write_bytes
from runner.dataset.item_facts import item_digests
from runner.facts import digests
from runner.plan.compile import Graph
from runner.plan.prepare import Prepared
from runner.records import read_packed, sound_record
from runner.store.gc import keys_files
from runner.store.store import RUN, Store
from schemas import RunConfig

RECORD_VERSION = 2
"""Of the record of an apply; version 1 has no facts, so that reasons are told from keys and items alone."""


@dataclass(frozen=True)
class Applied:
    """The record of the last apply."""

    record: dict[str, Any]
    file: Path

    @property
    def settings(self) -> tuple[str, ...]:
        """What --set gave then; nothing is known of applies before it was recorded."""
        given = self.record.get("settings")
        return tuple(str(typed) for typed in given) if isinstance(given, list) else ()

    def fingerprint(self, stage: str) -> str | None:
        """A stage's fingerprint."""
        found = self.record.get("fingerprints")
        return found.get(stage) if isinstance(found, dict) else None

    def file_changed(self, text: str) -> bool:
        """Whether run.toml was edited since."""
        return self.record.get("file_digest") not in (None, text_digest(text))

    def facts(self, stage: str) -> dict[str, str] | None:
        """A stage's facts, digest by digest; None where the apply left none behind."""
        found = self.record.get("facts")
        own = found.get(stage) if isinstance(found, dict) else None
        return own if isinstance(own, dict) else None

    @property
    def has_facts(self) -> bool:
        """Whether the apply left its facts behind, be it without a stage that there was not then."""
        return isinstance(self.record.get("facts"), dict)

    def got_through(self, stage: str) -> bool:
        """Whether the stage was done when the apply ended."""
        found = self.record.get("done")
        return stage in found if isinstance(found, list) else bool(self.record.get("complete", True))

    @cached_property
    def items(self) -> dict[str, list[str]]:
        """Name → `item_digests`; the first two of an older record."""
        content = read_packed(self.file.with_suffix(".items.gz")) or {}
        return {str(name): list(map(str, own)) for name, own in content.items() if isinstance(own, list)}

    def keys(self, kind: str) -> set[str]:
        """The keys of the items of the store that it needed."""
        found = (read_packed(keys_files(self.file)[0]) or {}).get(kind)
        return set(map(str, found)) if isinstance(found, list) else set()


def last_applied(store: Store, output_dir: Path) -> Applied | None:
    """The record of a run's last apply; None for a new run, or where the record is damaged."""
    file = store.run_record(output_dir)
    record = sound_record(file, {**RUN, "config": dict, "bits": dict, "steps": int})
    return Applied(record, file) if record is not None else None


def text_digest(text: str) -> str:
    """By which an edited run.toml is told."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def remember(graph: Graph, done: Sequence[str] = (), complete: bool = False) -> None:
    """Writes the record of this apply: what the next plan compares with, and what gc must keep. `done` are the stages that
    it got through; until it is `complete` the run's folder shows the apply before it, which is kept too."""
    prepared = graph.given
    store, output = prepared.store, prepared.output_dir
    before = last_applied(store, output)
    items = {item.name: item_digests(item) for item in (*prepared.collection.items, *prepared.collection.held_out)}
    file = store.run_record(output)
    applied_keys, shown_keys = keys_files(file)
    shown = None
    if before is not None and not complete:
        shown = before.record.get("shown")
        if before.record.get("complete", True):
            shown = before.record.get("fingerprints")
            if applied_keys.exists():
                copy_file(applied_keys, shown_keys)
    write_bytes(file.with_suffix(".items.gz"), gzip.compress(json.dumps(items).encode(), 3, mtime=0))
    write_bytes(applied_keys, gzip.compress(json.dumps(_needed_keys(graph)).encode(), 3, mtime=0))
    record = {
        "version": RECORD_VERSION,
        "file": store.portable(prepared.source.file),
        "output_dir": store.portable(output),
        "name": prepared.config.run.name,
        **_given(prepared),
        **_stages(graph, before),
        "bits": graph.runtime.bits(),
        "steps": prepared.length.steps,
        "done": list(done),
        "complete": complete,
        "shown": shown,
    }
    store.register(output, record)
    if complete:
        remove(shown_keys)


def remember_given(prepared: Prepared) -> None:
    """After an apply that had nothing to do: what was given this time is what the run was last applied with."""
    store, output = prepared.store, prepared.output_dir
    before = last_applied(store, output)
    if before is not None and {**before.record, **_given(prepared)} != before.record:
        store.register(output, {**before.record, **_given(prepared)})


def _given(prepared: Prepared) -> dict[str, Any]:
    """run.toml, --set, and the files they name, as of this apply."""
    return {
        "settings": list(prepared.source.overrides.values()),
        "file_digest": text_digest(prepared.source.text),
        "config": flat_config(prepared.config),
        "files": prepared.read_files,
    }


def _stages(graph: Graph, before: Applied | None) -> dict[str, Any]:
    """Fingerprint and facts of each stage; of one that is not known yet, those that it had before."""
    known = {name: node for name, node in graph.nodes.items() if node.known_after is None}
    found: dict[str, dict[str, Any]] = {
        "fingerprints": {name: node.fingerprint for name, node in known.items()},
        "facts": {name: digests(node.facts) for name, node in known.items()},
    }
    for name in graph.nodes if before is not None else ():
        assert before is not None
        old = before.fingerprint(name)
        if name not in known and old is not None:
            found["fingerprints"][name], found["facts"][name] = old, before.facts(name) or {}
    return found


def _needed_keys(graph: Graph) -> dict[str, list[str]]:
    """Kind of item → the keys that gc must keep."""
    found: dict[str, list[str]] = {}
    for node in graph.nodes.values():
        if node.known_after is None:
            for kind, keys in node.stage.keys(node.inputs, graph).items():
                found.setdefault(kind, []).extend(keys)
    return found


def flat_config(config: RunConfig) -> dict[str, Any]:
    """Dotted path (with list indexes) → value, of every leaf."""
    flat: dict[str, Any] = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict) and node:
            for name, value in node.items():
                walk(value, f"{path}.{name}" if path else name)
        elif isinstance(node, list) and any(isinstance(value, dict) for value in node):
            for index, value in enumerate(node):
                walk(value, f"{path}[{index}]")
        else:
            flat[path] = node

    walk(config.model_dump(mode="json"), "")
    return flat


def schema_path(path: str) -> str:
    """The path without list indexes."""
    return ".".join(part.partition("[")[0] for part in path.split("."))


def settings_text(settings: Iterable[str]) -> str:
    """As it is typed: `--set a.b=1 --set c.d=2`."""
    return " ".join(f"--set {shlex.quote(typed)}" for typed in settings)
