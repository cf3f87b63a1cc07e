"""Applies a plan: runs the stages in order, then brings the run's folder, the published files and the lock up to date."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from runner.atomic import remove
from runner.config.optimizer_kinds import OPTIMIZERS
from runner.core.events import Events
from runner.core.process import prepare_torch
from runner.data.items import DamagedItem, read_item
from runner.errors import RunFailed, Stopped, UsageError
from runner.families.registry import family
from runner.inputs.select import SelectInputs
from runner.inputs.train import TrainInputs
from runner.optim.build import try_optimizer
from runner.plan.compile import Graph, Node
from runner.plan.current import current_graph, dropped_pin, known_pin
from runner.plan.diff import Planning, within
from runner.plan.history import Applied, last_applied, remember
from runner.plan.prepare import Prepared
from runner.stages.checkpoints import DamagedCheckpoint
from runner.stages.context import Context, choose_device
from runner.stages.job import Job
from runner.stages.stop import StopFlag
from runner.store.artifacts import read_selection
from runner.store.lockfile import environment
from runner.store.run_folder import clear_pin
from runner.store.store import Store
from runner.store.tidy import tidy

MAX_REPAIRS = 3
"""How often damaged items are encoded again before the disk is blamed."""


@dataclass(kw_only=True)
class Outcome:
    """What an apply led to."""

    graph: Graph
    selection: dict[str, Any] | None
    notes: list[str]
    environment: dict[str, str]
    published: bool
    seconds: dict[str, float]
    """Stage → how long it took."""


class Apply:
    """One apply of a prepared run. `until` names the last stage to run."""

    def __init__(
        self, prepared: Prepared, events: Events, stop: StopFlag, until: str | None, plan_text: str, agreed: bool = True
    ) -> None:
        """`agreed`: work may give way to another training without asking."""
        self.prepared, self.events, self.until, self.agreed = prepared, events, until, agreed
        self.store: Store = prepared.store
        graph = current_graph(prepared)
        train = graph.of(TrainInputs)
        device = choose_device(prepared.config.run.device)
        prepare_torch(prepared.config.run.deterministic, graph.runtime.threads)
        optimizer = train.optimizer
        if (
            optimizer.type not in OPTIMIZERS or optimizer.args
        ):  # what the class itself refuses, before anything is loaded
            try_optimizer(optimizer)
        self.environment = environment(_device_name(device))
        bundle = family(prepared.config.model.family)
        self.context = Context(
            family=bundle,
            store=self.store,
            runtime=graph.runtime,
            numerics=train.numerics,
            device=device,
            events=events,
            stop=stop,
        )
        self.job = Job(
            context=self.context,
            prepared=prepared,
            graph=graph,
            until=until,
            remember=self._remember,
            plan_text=plan_text,
            environment=self.environment,
        )
        self.done: list[str] = []
        """The stages that this apply got through."""
        self.seconds: dict[str, float] = {}

    def run(self) -> Outcome:
        """Raises `Stopped` with the signal's exit code, `RunFailed`, and what the libraries raise for bugs."""
        known_pin(self.graph)
        tidy(self.store, self.prepared.output_dir)
        before = None if self.graph.is_known else last_applied(self.store, self.prepared.output_dir)
        if before is not None:
            _ = before.items  # read before they are written over
        self._remember()
        while (node := self._next()) is not None:
            self._stage(node)
            self.done.append(node.name)
            if not self.graph.is_known:
                self._plan_again(node, before)
        selection = self.graph.node(SelectInputs)
        chosen = read_selection(self.store, selection.fingerprint) if selection.name in self.done else None
        complete = set(self.done) == set(self.graph.nodes)
        if complete:
            if dropped_pin(self.graph) is not None:
                clear_pin(self.prepared.output_dir)
            remember(self.graph, self.done, complete=True)
        return Outcome(
            graph=self.graph,
            selection=chosen,
            notes=self.job.notes,
            environment=self.environment,
            published=complete,
            seconds=self.seconds,
        )

    @property
    def graph(self) -> Graph:
        return self.job.graph

    def _next(self) -> Node | None:
        """The first stage of the target that is not done."""
        return next((node for node in within(self.graph, self.until) if node.name not in self.done), None)

    def _plan_again(self, node: Node, before: Applied | None) -> None:
        """What was known only after a stage is there now. Raises `UsageError` where it makes another training of one that
        the run shows, and nobody has agreed to that."""
        waiting = [other.name for other in self.graph.nodes.values() if other.known_after is not None]
        self.job.compile()
        plan = Planning(self.graph, self.until, before).plan()
        for action in (plan.actions[name] for name in waiting if self.graph.nodes[name].known_after is None):
            because = f", because {'; '.join(action.reasons)}" if action.reasons else ""
            self.events.emit("note", text=f"{action.node} is known now: {action.summary}{because}")
        if plan.throws_away and not self.agreed:
            raise UsageError(
                f"after {node.name} it is known that this would train anew, and {plan.throws_away} give way in the run's folder",
                hint="say --yes to do it without asking; they stay in the store until `runner gc --delete`",
            )
        self.done = [name for name in self.done if name == node.name or not plan.actions[name].pending]
        self._remember()

    def _stage(self, node: Node) -> None:
        """One stage; an encoded item that turns out damaged is made again and the stage goes on from its state."""
        name, began = node.name, time.monotonic()
        found: DamagedItem | DamagedCheckpoint | None = None
        for attempt in range(MAX_REPAIRS + 1):
            if self.context.stop.is_set():
                raise Stopped(f"stopped before {name}", self.context.stop.code)
            self.events.stage = name
            try:
                if found is not None:
                    self._repair(found, name)
                    self.events.stage = name
                self._run(name)
                self._note_memory()
                self.context.free()
                self.seconds[name] = time.monotonic() - began
                return
            except (DamagedItem, DamagedCheckpoint) as damaged:
                if attempt == MAX_REPAIRS:
                    raise RunFailed(
                        f"files of the store are damaged again and again (the last: {damaged})",
                        hint="the disk of the store may be failing",
                    ) from None
                found = damaged

    def _run(self, name: str) -> None:
        node = self.graph.nodes[name]
        if node.known_after is not None:
            raise RunFailed(f"{name} cannot be planned: what it needs was to be known after {node.known_after}")
        node.stage.run(self.job, node.inputs)

    def _repair(self, damaged: DamagedItem | DamagedCheckpoint, name: str) -> None:
        """Makes again what a stage found damaged, and all that is damaged like it."""
        mending = [node for node in self.graph.nodes.values() if damaged.kind in node.stage.makes]
        if isinstance(damaged, DamagedItem):
            text = f"{damaged.kind} {damaged.key[:16]} is damaged or gone; it is encoded again"
            self.events.emit("warning", text=text)
            for node in mending:
                self._drop_damaged(damaged.kind, node)
        else:
            self.events.emit("warning", text=f"{damaged}; it is trained again")
            self.job.checkpoints().drop_damaged()
        self.job.reading = {name}
        needed = {node.name for node in mending}.union(*(node.stage.follows for node in mending))
        for other in [node.name for node in self.graph.nodes.values() if node.name in needed]:
            self._run(other)
        self.job.reading = set()

    def _drop_damaged(self, kind: str, node: Node) -> None:
        """Takes every item whose file is not whole out of the index, so that it is encoded again."""
        present = self.store.index.item_keys(kind)
        for key in dict.fromkeys(node.stage.keys(node.inputs, self.graph)[kind]):
            try:
                if key in present:
                    read_item(self.store, kind, key, anew=True)
            except DamagedItem:
                self.store.index.remove_item(kind, key)
                remove(self.store.item(kind, key))

    def _note_memory(self) -> None:
        """On a GPU: the most that a stage has held there, into the log."""
        if self.context.device.type == "cuda":
            self.events.emit("memory", device_bytes=torch.cuda.max_memory_reserved(self.context.device))
            torch.cuda.reset_peak_memory_stats(self.context.device)

    def _remember(self) -> None:
        remember(self.graph, self.done)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}, driver CUDA {torch.version.cuda}"
    return f"cpu, {torch.get_num_threads()} threads"
