"""The graph of a run as its store and its folder have it: kept checkpoints, and the choice by hand. Torch-free."""

from __future__ import annotations

from typing import Any

from runner.inputs.sample import SampleInputs
from runner.inputs.select import SelectInputs
from runner.inputs.train import TrainInputs
from runner.plan.compile import Graph, compile_graph
from runner.plan.history import last_applied
from runner.plan.prepare import Prepared
from runner.store.run_folder import PIN_TRAINING, read_pin, write_pin
from runner.store.training import TrainFolder


def trained_folder(graph: Graph) -> TrainFolder:
    """Where a graph's training is when it is finished."""
    node = graph.node(TrainInputs)
    return TrainFolder(graph.prepared.store.artifact(node.name, node.fingerprint))


def finished_training(graph: Graph) -> TrainFolder | None:
    """The finished training of a graph, if there is one."""
    folder = trained_folder(graph)
    return folder if folder.is_finished(graph.prepared.store.index.known_digest) else None


def current_graph(prepared: Prepared) -> Graph:
    """The graph, with the checkpoints that a finished training really has and the choice made by hand among them."""
    pin = read_pin(prepared.output_dir)
    graph = _compiled(prepared, _choice(pin))
    if pin is not None and _pinned_training(prepared, pin, graph) != graph.node(TrainInputs).fingerprint:
        pin, graph = None, _compiled(prepared, None)
    done = finished_training(graph)
    if done is not None:
        kept = done.checkpoint_steps()
        if tuple(kept) != graph.of(SampleInputs).steps:
            graph = _compiled(prepared, _choice(pin), kept)
    return graph


def _compiled(prepared: Prepared, pinned: dict[str, Any] | None, kept: list[int] | None = None) -> Graph:
    """The graph; the same as before where nothing that it is made of has changed since. One with something unknown is
    made anew each time."""
    made_of = pinned, kept, list(prepared.prompts), dict(prepared.weights)
    for other, graph in prepared.graphs:
        if other == made_of:
            return graph
    graph = compile_graph(prepared, pinned, kept)
    if graph.is_known:
        prepared.graphs.append((made_of, graph))
    return graph


def _choice(pin: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if pin is None else {name: value for name, value in pin.items() if name != PIN_TRAINING}


def _pinned_training(prepared: Prepared, pin: dict[str, Any], graph: Graph) -> str | None:
    """The training that a choice by hand is for: before it was written down, the one that was applied last."""
    if PIN_TRAINING in pin:
        return str(pin[PIN_TRAINING])
    applied = last_applied(prepared.store, prepared.output_dir)
    return None if applied is None else applied.fingerprint(graph.node(TrainInputs).name)


def dropped_pin(graph: Graph) -> dict[str, Any] | None:
    """A choice by hand that is for another training than the graph's."""
    pin = read_pin(graph.given.output_dir)
    return pin if pin is not None and graph.of(SelectInputs).pinned is None else None


def known_pin(graph: Graph) -> None:
    """Writes down which training a choice by hand is for, before another one is applied."""
    prepared = graph.given
    pin = read_pin(prepared.output_dir)
    train = None if pin is None or PIN_TRAINING in pin else _pinned_training(prepared, pin, graph)
    if pin is not None and train is not None:
        write_pin(prepared.output_dir, pin["step"], pin["weights"], train)
