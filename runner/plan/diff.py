"""Compares a graph with a store: what each stage has to do, and why. Torch-free; asks the disk little."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from runner.plan.compile import Graph, Node
from runner.plan.current import current_graph, dropped_pin
from runner.plan.history import Applied, last_applied, settings_text
from runner.plan.prepare import Prepared
from runner.plan.reasons import Differences, texts
from runner.plan.stage import Action, Reads, Stage, joined
from runner.store.store import Store


@dataclass
class Plan:
    """The actions of a graph on a store, in order."""

    prepared: Prepared
    graph: Graph
    actions: dict[str, Action]
    notes: list[str] = field(default_factory=list)

    @property
    def pending(self) -> bool:
        return any(action.pending for action in self.actions.values())

    @property
    def throws_away(self) -> str | None:
        """The trained work in whose place another training would be shown, in words; apply asks before it. It stays in the
        store until gc."""
        return next((action.throws_away for action in self.actions.values() if action.throws_away), None)

    def action(self, kind: type) -> Action:
        """The action of the stage with inputs of this kind."""
        return self.actions[self.graph.node(kind).name]


def make_plan(prepared: Prepared, until: str | None = None) -> Plan:
    """The plan of a run; with `until`, stages after that one are left alone."""
    return Planning(current_graph(prepared), until).plan()


def within(graph: Graph, until: str | None) -> list[Node]:
    """The stages up to a target: a stage, or several together by their alias."""
    nodes = list(graph.nodes.values())
    last = max((n for n, node in enumerate(nodes) if until in (node.name, node.stage.alias)), default=len(nodes) - 1)
    return nodes if until is None else nodes[: last + 1]


class Planning:
    """A plan while it is made: what one stage has to do may depend on what another one has."""

    def __init__(self, graph: Graph, until: str | None = None, applied: Applied | None = None) -> None:
        """`applied`: the apply to compare with, where that is not the last one."""
        self.prepared, self.graph, self.until = graph.prepared, graph, until
        self.store: Store = self.prepared.store
        self.applied = applied or last_applied(self.store, self.prepared.output_dir)
        self.also: set[str] = set()
        """Stages that read encodings whatever they have to do."""
        self._actions: dict[str, Action] = {}

    @cached_property
    def _differences(self) -> Differences | None:
        return None if self.applied is None else Differences(self.applied, self.graph)

    def plan(self) -> Plan:
        wanted = {node.name for node in within(self.graph, self.until)}
        actions = {name: self.action(name) for name in self.graph.nodes}
        for name, action in actions.items():
            if name not in wanted and action.pending:
                actions[name] = Action(node=name, symbol="=", summary="not in this target")
        return Plan(self.graph.given, self.graph, actions, self._notes())

    def action(self, name: str) -> Action:
        """What a stage has to do."""
        if name not in self._actions:
            node = self.graph.nodes[name]
            if node.known_after is not None:
                self._actions[name] = Action(node=name, symbol="+", summary=node.fingerprint)
            else:
                self._actions[name] = node.stage.pending(node.inputs, self)
        return self._actions[name]

    def readers(self) -> list[Node]:
        """The stages that read encodings now. Where the target ends before all of them, its caches are for all of them."""
        nodes = [node for node in self.graph.nodes.values() if type(node.stage).reads is not Stage.reads]
        ahead = {node.name for node in within(self.graph, self.until)}
        if not any(node.name in ahead for node in nodes):
            return nodes
        return [node for node in nodes if node.name in self.also or self._reads_now(node)]

    def _reads_now(self, node: Node) -> bool:
        return node.known_after is not None or node.stage.reads_now(self.action(node.name))

    def reads(self) -> Reads:
        """The encodings that they read, each text once."""
        return self._reads

    @cached_property
    def _reads(self) -> Reads:
        return joined(node.stage.reads(node.inputs) for node in self.readers())

    def reasons(self, name: str) -> list[str]:
        """Why a stage is another one than at the last apply."""
        return texts(self._differences.of(name)) if self._differences is not None else []

    def store_reasons(self, name: str, kind: str, lacking: list[str]) -> list[str]:
        """Why a stage has items to make: it is another one, or these are no longer where they were."""
        reasons = self.reasons(name)
        if reasons or self.applied is None:
            return reasons
        if not self.applied.got_through(name):
            return ["the last apply was stopped before all were made"]
        return ["they are no longer in the store"] if self.applied.keys(kind).issuperset(lacking) else []

    def _notes(self) -> list[str]:
        """What was said for the run's last apply and does not hold here."""
        notes = []
        now = tuple(self.prepared.source.overrides.values())
        if self.applied is not None and self.applied.settings not in ((), now):
            mine = f"this plan is with {settings_text(now)}" if now else "this plan is without it"
            notes.append(f"the run was last applied with {settings_text(self.applied.settings)}; {mine}")
        pin = dropped_pin(self.graph)
        if pin is not None:
            notes.append(
                f"step {pin['step']} was chosen by hand for another training; the rule chooses here, until"
                f" `runner select {self.prepared.source.file.name} --step N`"
            )
        return notes
