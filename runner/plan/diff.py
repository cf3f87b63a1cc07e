"""Compares a graph with a store: what each stage has to do, and why. Torch-free; asks the disk little."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from runner.errors import Diagnostic, Invalid, InvalidConfig
from runner.inputs import LEAST_FOR_ERROR, SelectInputs, TrainInputs
from runner.plan.compile import Graph, compile_graph
from runner.plan.history import (
    Applied,
    config_reasons,
    content_reasons,
    flat_config,
    last_applied,
    settings_text,
    training_reasons,
    weight_reasons,
)
from runner.plan.keys import wanted_texts, wanted_views
from runner.plan.prepare import Prepared
from runner.plan.resolve import checkpoint_steps
from runner.store.artifacts import read_selection
from runner.store.published import Published, view_is_current
from runner.store.run_folder import PIN, read_pin, write_pin
from runner.store.training import TrainFolder, longest_of, named_steps

Symbol = Literal["+", "~", "-/+", "="]
_WORDS = {"+": "create", "~": "continue", "-/+": "replace", "=": "none"}


@dataclass
class Action:
    """What one stage does. `missing` of `total` things are made: items, steps, pictures, measurements."""

    node: str
    symbol: Symbol
    summary: str
    reasons: list[str] = field(default_factory=list)
    total: int = 0
    missing: int = 0

    @property
    def pending(self) -> bool:
        return self.symbol != "="

    def as_record(self) -> dict[str, Any]:
        """The action for `--json`."""
        return {
            "stage": self.node, "action": _WORDS[self.symbol], "symbol": self.symbol, "summary": self.summary,
            "reasons": self.reasons, "total": self.total, "missing": self.missing,
        }  # fmt: skip


@dataclass
class Plan:
    """The actions of a graph on a store, in order."""

    prepared: Prepared
    graph: Graph
    actions: dict[str, Action]
    throws_away: str | None = None
    """The trained work in whose place another training would be shown, in words; apply asks before it. It stays in the store
    until gc."""
    notes: list[str] = field(default_factory=list)

    @property
    def pending(self) -> bool:
        return any(action.pending for action in self.actions.values())


def make_plan(prepared: Prepared, until: str | None = None) -> Plan:
    """The plan of a run; with `until`, stages after that one are left alone."""
    return _Diff(prepared).plan(until)


def finished_training(prepared: Prepared, graph: Graph) -> TrainFolder | None:
    """The finished training of a graph, if there is one."""
    folder = TrainFolder(prepared.store.artifact("train", graph.fingerprint("train")))
    return folder if folder.is_finished(prepared.store.index.known_digest) else None


def current_graph(prepared: Prepared) -> Graph:
    """The graph, with the checkpoints that a finished training really has and the choice made by hand among them."""
    pin = read_pin(prepared.output_dir)
    graph = compile_graph(prepared, _choice(pin))
    if pin is not None and _pinned_training(prepared, pin) != graph.fingerprint("train"):
        pin, graph = None, compile_graph(prepared)
    done = finished_training(prepared, graph)
    if done is not None:
        kept = done.checkpoint_steps()
        if tuple(kept) != graph.sample.steps:
            graph = compile_graph(prepared, _choice(pin), kept)
    return graph


def _choice(pin: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if pin is None else {name: value for name, value in pin.items() if name != "train"}


def _pinned_training(prepared: Prepared, pin: dict[str, Any]) -> str | None:
    """The training that a choice by hand is for: before it was written down, the one that was applied last."""
    if "train" in pin:
        return str(pin["train"])
    applied = last_applied(prepared.store, prepared.output_dir)
    return None if applied is None else applied.fingerprint("train")


def dropped_pin(prepared: Prepared, graph: Graph) -> dict[str, Any] | None:
    """A choice by hand that is for another training than the graph's."""
    pin = read_pin(prepared.output_dir)
    return pin if pin is not None and graph.select.pinned is None else None


def known_pin(prepared: Prepared) -> None:
    """Writes down which training a choice by hand is for, before another one is applied."""
    pin = read_pin(prepared.output_dir)
    train = None if pin is None or "train" in pin else _pinned_training(prepared, pin)
    if pin is not None and train is not None:
        write_pin(prepared.output_dir, pin["step"], pin["weights"], train)


class _Diff:
    def __init__(self, prepared: Prepared) -> None:
        self.prepared, self.store = prepared, prepared.store
        self.graph = current_graph(prepared)
        self.applied: Applied | None = last_applied(self.store, prepared.output_dir)
        self.config = flat_config(prepared.config)
        self.throws_away: str | None = None

    def plan(self, until: str | None) -> Plan:
        train = self._train()
        sample = self._sample(train)
        select = self._select(train, sample)
        publish = self._publish(select)
        latents, texts = self._caches(train, select)
        actions = {action.node: action for action in (latents, texts, train, sample, select, publish)}
        if until is not None:
            names = list(actions)
            for name in names[names.index(until) + 1 :] if until != "cache" else names[2:]:
                if actions[name].pending:
                    actions[name] = Action(name, "=", "not in this target")
            if until == "cache" or names.index(until) < 2:
                self._only_cache(actions)
        throws_away = self.throws_away if actions["train"].pending else None
        return Plan(self.prepared, self.graph, actions, throws_away, self._notes())

    def _notes(self) -> list[str]:
        """What was said for the run's last apply and does not hold here."""
        notes = []
        now = tuple(self.prepared.source.overrides.values())
        if self.applied is not None and self.applied.settings not in ((), now):
            mine = f"this plan is with {settings_text(now)}" if now else "this plan is without it"
            notes.append(f"the run was last applied with {settings_text(self.applied.settings)}; {mine}")
        pin = dropped_pin(self.prepared, self.graph)
        if pin is not None:
            notes.append(
                f"step {pin['step']} was chosen by hand for another training; the rule chooses here, until"
                f" `runner select {self.prepared.source.file.name} --step N`"
            )
        return notes

    def _only_cache(self, actions: dict[str, Action]) -> None:
        """A target of `cache` fills the caches for the whole run, whether or not training still needs them."""
        actions["cache.latents"], actions["cache.text"] = self._cache_actions(self.graph.train, self.graph.select)
        self.throws_away = None

    # --- caches -------------------------------------------------------------------------------------------------------

    def _caches(self, train: Action, select: Action) -> tuple[Action, Action]:
        needed_by_train = self.graph.train if train.pending else None
        needed_by_select = self.graph.select if select.missing else None
        return self._cache_actions(needed_by_train, needed_by_select)

    def _cache_actions(self, train: TrainInputs | None, select: SelectInputs | None) -> tuple[Action, Action]:
        graph, seed, runtime = self.graph, self.graph.train.seed, self.graph.runtime
        latents = texts = None
        if runtime.latents == "disk":
            encoder, size = graph.latents.encoder, runtime.latent_batch_size
            views = wanted_views(train, select, seed)
            latents = list(dict.fromkeys(encoder.key(item.picture, view, size) for item, view in views))
        if runtime.texts == "disk":
            captions = wanted_texts(train, select, seed)
            texts = [graph.texts.encoder.key(text, runtime.text_batch_size) for text in captions]
        needed = train is not None or select is not None
        return (
            self._cache("cache.latents", "latents", latents, needed, self._nouns()),
            self._cache("cache.text", "text", texts, needed, ("caption", "captions")),
        )

    def _nouns(self) -> tuple[str, str]:
        """What the items are, one and several."""
        kinds = {item.clip is not None for item in self.graph.train.items}
        if kinds == {True}:
            return "clip", "clips"
        return ("picture", "pictures") if kinds <= {False} else ("picture or clip", "pictures and clips")

    def _cache(self, node: str, kind: str, keys: list[str] | None, needed: bool, nouns: tuple[str, str]) -> Action:
        if keys is None:
            place = self.graph.runtime.latents if kind == "latents" else self.graph.runtime.texts
            where = "encoded at each start and held in memory" if place == "memory" else "encoded at each use"
            return Action(node, "=", where)
        if not needed:
            return Action(node, "=", "not needed: what follows is done")
        present = self.store.index.item_keys(kind)
        missing = sum(1 for key in keys if key not in present)
        total = len(keys)
        if missing == 0:
            return Action(node, "=", f"all {total} {nouns[1]} are encoded", total=total)
        if missing == total:
            summary = f"encode {total} {nouns[total != 1]}"
        else:
            summary = f"encode {missing} of {total} {nouns[1]}, reuse {total - missing}"
        reasons = self._cache_reasons(node, kind) if self.applied is not None else []
        return Action(node, "+" if missing == total else "~", summary, reasons, total, missing)

    def _cache_reasons(self, node: str, kind: str) -> list[str]:
        assert self.applied is not None
        reasons = config_reasons(self.applied.record.get("config", {}), self.config, [node])
        names = ("vae",) if kind == "latents" else (*self.prepared.model.text_encoders, "tokenizer")
        reasons += weight_reasons(self.applied, self.prepared, names)
        reasons += content_reasons(self.applied, self.prepared, kind == "latents", kind == "text")
        bits = self.applied.record.get("bits", {})
        key = "caching.latent_batch_size" if kind == "latents" else "caching.text_batch_size"
        now = self.graph.runtime.bits()[key]
        if bits and bits.get(key) != now:
            reasons.append(f"{key} {bits.get(key)} → {now}")
        return reasons or ["they are no longer in the store"]

    # --- training -----------------------------------------------------------------------------------------------------

    def _train(self) -> Action:
        graph, steps = self.graph, self.graph.train.steps
        if finished_training(self.prepared, graph) is not None:
            return Action("train", "=", f"{steps} steps are trained", total=steps)
        damaged = TrainFolder(self.store.artifact("train", graph.fingerprint("train")))
        if damaged.newest_step():
            return self._mending(damaged)
        workspace = TrainFolder(self.store.workspace("train", graph.fingerprint("train")))
        if workspace.record() is not None:
            done = min(workspace.newest_step() or 0, steps)
            summary = f"continue from step {done} of {steps}" if done else f"start again: {steps} steps"
            return Action("train", "~", summary, ["stopped before its end"], steps, steps - done)
        if not graph.train.has_horizon:
            others = [
                TrainFolder(folder) for folder in (*self.store.artifacts("train"), *self.store.workspaces("train"))
            ]
            longest = longest_of(others, graph.train.trajectory(), steps)
            if longest is not None and longest[0] > 0:
                old = self.applied.record.get("steps") if self.applied else None
                reason = (
                    f"training.max_train_steps {old} → {steps}" if old and old != steps else "a shorter run is there"
                )
                return Action("train", "~", f"extend {longest[0]} → {steps} steps", [reason], steps, steps - longest[0])
        reasons = self._train_reasons()
        old_steps = self._work_thrown_away()
        if old_steps:
            self.throws_away = f"{old_steps} trained steps of run {self.prepared.config.run.name!r}"
            return Action("train", "-/+", f"train {steps} steps anew", reasons, steps, steps)
        return Action("train", "+", f"train {steps} steps", reasons, steps, steps)

    def _mending(self, folder: TrainFolder) -> Action:
        """What a finished training needs whose record or whose checkpoints are damaged."""
        steps, runtime = self.graph.train.steps, self.graph.runtime
        done = min(folder.newest_step() or 0, steps)
        planned = checkpoint_steps(steps, runtime.checkpoint_every)
        lacking = {*folder.gaps(planned, runtime.keep), *folder.damaged_steps(self.store.index.known_digest)}
        gaps = sorted(gap for gap in lacking if gap < done)
        again = gaps[-1] if gaps else 0
        summary = f"finish again from step {done} of {steps}"
        if gaps:
            summary = f"make {named_steps(gaps)} again: {again} steps"
        return Action(
            "train", "~", summary, ["its record or a checkpoint is gone or damaged"], steps, again + steps - done
        )

    def _train_reasons(self) -> list[str]:
        if self.applied is None:
            return []
        reasons = training_reasons(self.applied, self.prepared)
        if (
            reasons
            and self.graph.train.has_horizon
            and all(reason.startswith("training.max_train") for reason in reasons)
        ):
            reasons.append(f'the schedule "{self.graph.train.scheduler.type}" depends on the length')
        return reasons

    def _work_thrown_away(self) -> int:
        """Steps that the run's last apply has trained under another fingerprint."""
        if self.applied is None:
            return 0
        old = self.applied.record.get("fingerprints", {}).get("train")
        if old is None or old == self.graph.fingerprint("train"):
            return 0
        for path in (self.store.artifact("train", old), self.store.workspace("train", old)):
            step = TrainFolder(path).newest_step()
            if step:
                return step
        return 0

    # --- after training -----------------------------------------------------------------------------------------------

    def _sample(self, train: Action) -> Action:
        inputs = self.graph.sample
        prompts, checkpoints = len(inputs.prompts), len(inputs.steps) * (2 if inputs.ema else 1) + 1
        if prompts == 0:
            return Action("sample", "=", "no prompts")
        total = prompts * checkpoints
        moving = {prompt.is_video for prompt in inputs.prompts}
        made = "videos" if moving == {True} else "pictures" if moving == {False} else "pictures and videos"
        if any(prompt.seed is None for prompt in inputs.prompts):
            return Action("sample", "+", f"make {total} {made}; seeds of -1 are drawn", total=total, missing=total)
        indexed, store = self.store.index.item_keys("samples"), self.store
        wanted = [(0, "raw")] + [
            (step, kind) for step in inputs.steps for kind in (("raw", "ema") if inputs.ema else ("raw",))
        ]
        keys = [inputs.key(prompt, step, kind) for step, kind in wanted for prompt in inputs.prompts]
        missing = sum(1 for key in keys if key not in indexed or not store.item("samples", key).is_file())
        if missing == 0:
            return Action("sample", "=", f"all {total} {made} are made", total=total)
        reasons = []
        if self.applied is not None and not train.pending:
            reasons = config_reasons(self.applied.record.get("config", {}), self.config, ["sample"])
        listed = f"{prompts} prompt{'s' * (prompts != 1)} x {checkpoints} columns (base and checkpoints)"
        reuse = f", reuse {total - missing}" if missing < total else ""
        return Action(
            "sample",
            "+" if missing == total else "~",
            f"make {missing} of {total} {made}{reuse}: {listed}",
            reasons,
            total,
            missing,
        )

    def _select(self, train: Action, sample: Action) -> Action:
        inputs = self.graph.select
        self._manual(train)
        count = len(inputs.steps) * (2 if inputs.ema else 1)
        record = read_selection(self.store, self.graph.fingerprint("select"))
        if not train.pending and record is not None:
            return Action("select", "=", "chosen: " + chosen_text(record))
        present = self.store.index.item_keys("scores")
        missing = 0
        if inputs.metrics:
            candidates = [(0, "raw")] + [
                (s, w) for s in inputs.steps for w in (("raw", "ema") if inputs.ema else ("raw",))
            ]
            missing = sum(1 for step, weights in candidates if inputs.score_key(step, weights) not in present)
        items = (
            f"{len(inputs.held_out)} held-out items"
            if inputs.held_out
            else f"{len(inputs.compared)} training items (nothing is held out)"
        )
        measured = len(inputs.held_out) or len(inputs.compared)
        if inputs.strategy == "best" and measured < LEAST_FOR_ERROR:
            items += f", fewer than {LEAST_FOR_ERROR}: the lowest loss decides"
        how = f"measure {missing} of {count + 1} on {items}" if inputs.metrics else "nothing is measured"
        reasons = []
        if self.applied is not None and not train.pending:
            reasons = config_reasons(self.applied.record.get("config", {}), self.config, ["select"])
        summary = f"choose among {count} candidates; {how}"
        return Action("select", "+", summary, reasons, count + 1, missing)

    def _manual(self, train: Action) -> None:
        """A checkpoint to choose that is not there, or will not be made. Raises `InvalidConfig`."""
        inputs = self.graph.select
        if inputs.pinned is not None and not train.pending:
            self._pinned(inputs.pinned["step"], inputs.pinned["weights"])
        if inputs.strategy != "manual" or inputs.pinned is not None or inputs.step in inputs.steps:
            return
        runtime = self.graph.runtime
        if train.pending and inputs.step in checkpoint_steps(self.graph.train.steps, runtime.checkpoint_every):
            return  # of those before the newest `keep` the best stays
        there = "will be" if train.pending else "is"
        steps = ", ".join(map(str, inputs.steps[-20:]))
        raise InvalidConfig(
            [
                Diagnostic(
                    f"there {there} no checkpoint at step {inputs.step}",
                    self.prepared.source.value_places(("selection", "step")), f"checkpoints are at steps {steps}",
                )
            ]
        )  # fmt: skip

    def _pinned(self, step: int, weights: str) -> None:
        """Raises `Invalid` for a choice by hand of what this training has not."""
        inputs = self.graph.select
        if step not in inputs.steps or (weights == "ema" and not inputs.ema):
            raise Invalid(
                f"{self.prepared.output_dir / PIN} chooses what this training has not: checkpoint {step} ({weights})",
                hint="delete it, or choose again with `runner select --step`; "
                f"checkpoints are at steps {', '.join(map(str, inputs.steps[-20:]))}",
            )

    def _publish(self, select: Action) -> Action:
        targets = len(self.graph.publish.targets)
        what = f"{targets} target{'s' * (targets != 1)}" if targets else "strip, report, best.safetensors"
        if select.pending:
            return Action(
                "publish", "+", f"write {what}" if not targets else f"write strip, report, best.safetensors and {what}"
            )
        problem = view_is_current(Published.read(self.prepared.output_dir), self.graph.fingerprint("publish"))
        if problem is None:
            return Action("publish", "=", "everything is in its place")
        return Action("publish", "~", "refresh the run's folder and published files", [problem])


def chosen_text(record: dict[str, Any]) -> str:
    """`step 300 (lowest stable loss, 0.05)`."""
    chosen = record["chosen"]
    suffix = "" if chosen["weights"] == "raw" else f" {chosen['weights']}"
    return f"step {chosen['step']}{suffix} ({record['reason']})"
