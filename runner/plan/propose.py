"""Proposes a short run.toml for a model and a folder of pictures: family, sizes, settings that fit, prompts; torch-free."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomlkit

from runner.config.load import load
from runner.errors import InvalidConfig
from runner.families.detect import detect
from runner.inputs.select import LEAST_FOR_ERROR
from runner.media import is_media
from runner.plan.diff import make_plan
from runner.plan.estimate import figures
from runner.plan.fit import Fit, fit
from runner.plan.prepare import Prepared, prepare
from runner.plan.render import counted, memory_words, size_text
from runner.seeding import lot
from runner.store.store import find_store

PROMPTS = 3
SCHEMA = "run.schema.json"
"""The file beside run.toml that its first line names, for editors."""
HELD_OUT_SHARE = 5
"""At most one of so many pictures is held out."""
MOST_HELD_OUT = 32


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What was asked for."""

    model: str
    images: Path
    method: str
    class_tokens: str | None
    name: str | None
    memory: int | None
    """Bytes of the GPU that will train; None: what --fit would change is left alone."""
    settings: Sequence[str]


@dataclass(frozen=True)
class Proposal:
    """The text of a run.toml, and what to say about it."""

    text: str
    notes: list[str]


def uncaptioned(images: Path) -> int:
    """Pictures directly in a folder that have no .txt beside them; 0 for a folder of `N_name` folders."""
    if not images.is_dir() or re.match(r"\d+_", images.name):
        return 0
    names = set(os.listdir(images))
    pictures = [name for name in names if is_media(name, "image")]
    return sum(1 for name in pictures if os.path.splitext(name)[0] + ".txt" not in names)


def propose(wishes: Wishes, target: Path) -> Proposal:
    """Raises `Invalid` where the model is of no family, and `InvalidConfig` where the model or the pictures do not do."""
    folder = target.absolute().parent
    family, file = detect(wishes.model)
    document = _first(wishes, family, file, folder)
    run = _prepared(document, wishes.settings, folder)
    _suit(document, wishes, run)
    run = _prepared(document, wishes.settings, folder)
    notes = [f"{run.spec.title}, {counted(len(run.collection.items), 'picture')}, {counted(run.length.steps, 'step')}"]
    notes.append(_held_out(run))
    notes += _noise(run)
    plan = make_plan(run)
    if wishes.memory is not None:
        notes.append(_fitted(document, fit(plan, wishes.memory)))
        _prepared(document, wishes.settings, folder)
    else:
        numbers = figures(plan, None)
        notes.append(
            f"predicted peak memory: {size_text(numbers.peak)} {memory_words(numbers.device)}; with --memory settings are chosen that fit"
        )
    typed = shlex.quote(str(target))
    notes.append(f"next, to look at the plan and to train:\n  runner plan {typed}\n  runner apply {typed}")
    head = f"#:schema ./{SCHEMA}\n# Written by `runner new`. Every key: `runner explain KEY`, docs/run_toml.md; all spelled out: `runner fmt --full {shlex.quote(target.name)}`.\n"
    return Proposal(head + _with_settings(document, wishes.settings), notes)


def default_name(images: Path) -> str:
    """A run's name after its folder of pictures: `cat` of `10_cat`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", re.sub(r"^\d+_", "", images.absolute().name)).strip("-._") or "run"


def _held_out(run: Prepared) -> str:
    """What selection will look at."""
    count = len(run.collection.held_out)
    if count:
        return f"{counted(count, 'picture')} held out: the checkpoint is chosen by them"
    least = LEAST_FOR_ERROR * HELD_OUT_SHARE
    return f"nothing is held out, which needs {least} pictures: the checkpoint is chosen by training items, which cannot show overfitting"


def _noise(run: Prepared) -> list[str]:
    """What the checkpoint says of its noise, where that is not what most do."""
    why = {item.key: item.why for item in run.derived}
    if run.config.model.prediction_type != "v_prediction" or "model.prediction_type" not in why:
        return []
    pure = why.get("training.loss.zero_terminal_snr") if run.config.training.loss.zero_terminal_snr else None
    return [f"it predicts v ({why['model.prediction_type']})" + (f", to pure noise ({pure})" if pure else "")]


def _first(wishes: Wishes, family: str, file: Path, folder: Path) -> dict[str, Any]:
    """The least that can be planned with."""
    images = wishes.images.absolute()
    name = wishes.name or default_name(images)
    source: dict[str, Any] = {"path": _relative(images, folder)}
    if wishes.class_tokens is not None:
        source["class_tokens"] = wishes.class_tokens
    model = wishes.model if wishes.model.startswith("builtin:") else _relative(file.absolute(), folder)
    document: dict[str, Any] = {
        "schema_version": 1,
        "run": {"name": name},
        "model": {"family": family, "checkpoint": model},
        "dataset": {"sources": [source]},
        "training": {"max_train_steps": 1},
    }
    if wishes.method == "lora":
        document["network"] = {"rank": 16}
    return document


def _relative(path: Path, folder: Path) -> str:
    """A path as run.toml should hold it: relative where it lies beside or below, else whole."""
    try:
        relative = os.path.relpath(path, folder)
    except ValueError:  # another drive
        return str(path)
    return str(path) if relative.startswith(f"..{os.sep}..") else Path(relative).as_posix()


def _prepared(document: dict[str, Any], settings: Sequence[str], folder: Path) -> Prepared:
    """Plans with a document as if it lay in `folder`. Raises `InvalidConfig`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".toml", prefix=".new-", dir=folder, encoding="utf-8") as stream:
        stream.write(tomlkit.dumps(document))
        stream.flush()
        try:
            return prepare(load(Path(stream.name), settings), find_store(folder))
        except InvalidConfig as error:  # its places are in a file that nobody wrote
            raise InvalidConfig([replace(finding, places=()) for finding in error.diagnostics]) from None


def _suit(document: dict[str, Any], wishes: Wishes, run: Prepared) -> None:
    """Settings that suit the model and the pictures."""
    items = run.collection.items
    areas = sorted(item.fit.original[0] * item.fit.original[1] for item in items)
    native = run.model.native_size
    median = int(areas[len(areas) // 2] ** 0.5)
    step = run.model.bucket_step
    document["dataset"]["resolution"] = native if median >= native * 0.9 else max(step, median // step * step)
    count = len(items)
    uses = run.collection.uses_per_epoch
    document["dataset"]["batch_size"] = 4 if uses >= 200 else 2 if uses >= 20 else 1
    if count >= LEAST_FOR_ERROR * HELD_OUT_SHARE:
        document["dataset"]["held_out"] = {"count": max(LEAST_FOR_ERROR, min(MOST_HELD_OUT, count // 10))}
    full = wishes.method == "full"
    pictures = min(20_000, max(1_500, 100 * count)) if not full else min(60_000, max(3_000, 150 * count))
    document["training"] = {
        "max_train_steps": max(200, int(round(pictures / document["dataset"]["batch_size"], -2))),
        "learning_rate": 1e-5 if full else 1e-4,
        "scheduler": {"type": "cosine", "warmup_ratio": 0.05},
    }
    document["dataset"]["caption_dropout_rate"] = 0.05
    captions = list(dict.fromkeys(line for item in items if (line := item.text.strip().partition("\n")[0])))
    chosen = sorted(captions, key=lambda text: lot(run.config.run.seed, text))[:PROMPTS]
    if chosen:
        document["sampling"] = {"prompts": [{"prompt": text[:400]} for text in sorted(chosen)]}


def _fitted(document: dict[str, Any], found: Fit) -> str:
    for dotted, value in found.settings.items():
        node = document
        *tables, key = dotted.split(".")
        for table in tables:
            node = node.setdefault(table, {})
        node[key] = value
    limit, after = size_text(found.limit), f"{size_text(found.after)} predicted {memory_words('cuda')}"
    if not found.fits:
        return f"warning: nothing fits into {limit}; with all that can be done {after}"
    if not found.steps:
        return f"fits into {limit} as it is: {after}"
    reasons = "; ".join(remedy.why for remedy, _ in found.steps)
    return f"fits into {limit}: {after}, instead of {size_text(found.before)}, because {reasons}"


def _with_settings(document: dict[str, Any], settings: Sequence[str]) -> str:
    from runner.config.overrides import apply_overrides

    apply_overrides(document, settings)
    order = ("schema_version", "run", "model", "network", "dataset", "caching", "training", "sampling", "selection")
    return tomlkit.dumps({name: document[name] for name in order if name in document})
