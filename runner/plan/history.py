"""What a run was when it was last applied, and how the present configuration differs from that: the reasons in a plan."""

from __future__ import annotations

import gzip
import hashlib
import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.atomic import copy_file, remove, write_bytes
from runner.dataset.encodings import TrainItem
from runner.plan.prepare import Prepared
from runner.records import read_packed, sound_record
from runner.store.gc import keys_files
from runner.store.store import RUN, Store
from schemas import RunConfig
from schemas.walk import all_keys


@dataclass(frozen=True)
class Applied:
    """The record of the last apply."""

    record: dict[str, Any]
    items_file: Path

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

    def items(self) -> dict[str, list[str]]:
        """Name → [picture's digest, caption's hash]."""
        content = read_packed(self.items_file) or {}
        try:
            return {name: [str(picture), str(caption)] for name, (picture, caption) in content.items()}
        except (ValueError, TypeError):
            return {}


def last_applied(store: Store, output_dir: Path) -> Applied | None:
    """The record of a run's last apply; None for a new run, or where the record is damaged."""
    file = store.run_record(output_dir)
    record = sound_record(file, {**RUN, "config": dict, "bits": dict, "weights": {str: str}, "steps": int})
    return Applied(record, file.with_suffix(".items.gz")) if record is not None else None


def text_digest(text: str) -> str:
    """By which an edited run.toml is told."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def remember(prepared: Prepared, content: dict[str, Any], keys: dict[str, list[str]], complete: bool) -> None:
    """Writes the record of this apply, its items, and the keys that gc must keep. Until an apply is `complete` the run's
    folder shows the one before it, which is kept too."""
    store, output = prepared.store, prepared.output_dir
    before = last_applied(store, output)
    items = {
        item.name: [item.digest, _caption_hash(item)]
        for item in (*prepared.collection.items, *prepared.collection.held_out)
    }
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
    write_bytes(applied_keys, gzip.compress(json.dumps(keys).encode(), 3, mtime=0))
    store.register(output, {**content, **_given(prepared), "complete": complete, "shown": shown})
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
        "settings": list(prepared.source.overrides.values()), "file_digest": text_digest(prepared.source.text),
        "config": flat_config(prepared.config), "weights": prepared.weights,
    }  # fmt: skip


def _caption_hash(item: TrainItem) -> str:
    return hashlib.sha256(item.text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


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


def config_reasons(old: dict[str, Any], new: dict[str, Any], stages: Iterable[str]) -> list[str]:
    """`dataset.resolution 768 → 1024` for each key that reaches one of the stages."""
    return [f"{path} {_shown(then)} → {_shown(now)}" for path, then, now in config_changes(old, new, stages)]


def config_changes(old: dict[str, Any], new: dict[str, Any], stages: Iterable[str]) -> list[tuple[str, Any, Any]]:
    """(path, old value, new value) of each key that reaches one of the stages."""
    wanted, keys = set(stages), all_keys()
    changes = []
    for path in sorted(set(old) | set(new)):
        if old.get(path) == new.get(path):
            continue
        key = keys.get(schema_path(path))
        if key is None:  # an entry of a table such as optimizer.args
            parent = schema_path(path).rpartition(".")[0]
            key = keys.get(parent)
        if key is not None and key.effect != "bits" and wanted & set(key.stages):
            changes.append((path, old.get(path), new.get(path)))
    return changes


def training_reasons(applied: Applied, prepared: Prepared) -> list[str]:
    """Why this is another training than the one that was applied last."""
    stages = ["train", "cache.latents", "cache.text"]
    reasons = config_reasons(applied.record.get("config", {}), flat_config(prepared.config), stages)
    parts = ("denoiser", "vae", *prepared.model.text_encoders, "tokenizer", "init_from")
    reasons += weight_reasons(applied, prepared, [name for name in parts if name in prepared.weights])
    return reasons + content_reasons(applied, prepared, True, True)


def settings_text(settings: Iterable[str]) -> str:
    """As it is typed: `--set a.b=1 --set c.d=2`."""
    return " ".join(f"--set {shlex.quote(typed)}" for typed in settings)


TEXT_ENCODERS = ("text_encoder_1", "text_encoder_2", "text_encoder_3")


def content_reasons(applied: Applied, prepared: Prepared, pictures: bool, captions: bool) -> list[str]:
    """What changed in the folders since the last apply, by name."""
    old = applied.items()
    new = {item.name: item for item in (*prepared.collection.items, *prepared.collection.held_out)}
    reasons = []
    added, removed = sorted(set(new) - set(old)), sorted(set(old) - set(new))
    for word, names in (("added", added), ("removed", removed)):
        if names:
            reasons.append(f"{len(names)} items {word} ({_some(names)})" if len(names) > 1 else f"{names[0]} {word}")
    changed = [name for name in new if name in old and new[name].digest != old[name][0]]
    edited = [name for name in new if name in old and _caption_hash(new[name]) != old[name][1]]
    if pictures and changed:
        reasons.append(f"{_counted(len(changed), 'picture')} replaced ({_some(sorted(changed))})")
    if captions and edited:
        reasons.append(f"{_counted(len(edited), 'caption')} edited ({_some(sorted(edited))})")
    return reasons


def weight_reasons(applied: Applied, prepared: Prepared, names: Iterable[str]) -> list[str]:
    """Model files whose content changed."""
    keys = {
        "denoiser": "model.checkpoint", "vae": "model.vae", "tokenizer": "model.tokenizer_1",
        "init_from": "network.init_from", **{name: f"model.{name}" for name in TEXT_ENCODERS},
    }  # fmt: skip
    old = applied.record.get("weights", {})
    changed = [name for name in names if old.get(name) != prepared.weights.get(name)]
    model = prepared.config.model
    own = {"vae": model.vae, **{name: getattr(model, name) for name in TEXT_ENCODERS}}
    found = [keys[name] if own.get(name, True) else "model.checkpoint" for name in changed]
    return [f"{key}: its content changed" for key in dict.fromkeys(found)]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _shown(value: Any) -> str:
    text = "unset" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "…"
