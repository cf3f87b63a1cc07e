"""Finds the weights that a command names: best, a step, or a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from runner.errors import Invalid
from runner.files import near_name
from runner.formats.adapter_names import is_adapter_file
from runner.formats.adapter_read import read_adapters
from runner.inputs.select import SelectInputs
from runner.inputs.train import TrainInputs
from runner.plan.compile import Graph
from runner.stages.checkpoints import Checkpoints
from runner.store.artifacts import read_selection
from runner.store.store import Store
from runner.weights.headers import read_header
from runner.weights.tensors import read_tensors


@dataclass(frozen=True)
class Chosen:
    """Weights of a run: a checkpoint (step 0 is the base model), or a file."""

    step: int | None
    weights: str
    file: Path | None = None

    @property
    def label(self) -> str:
        """As in the strip; a file is called by its name."""
        from runner.stages.previews import label_of

        if self.step is None:
            assert self.file is not None
            return self.file.name
        return label_of(self.step, self.weights)


def find_checkpoint(store: Store, graph: Graph, name: str) -> Chosen:
    """`best`, `last`, `base`, `50`, `50:ema` or a file. Raises `Invalid`."""
    checkpoints = run_checkpoints(store, graph)
    steps = checkpoints.steps()
    listed = f"checkpoints are at steps {', '.join(map(str, steps))}" if steps else "the run has no checkpoints yet"
    if name == "base":
        return Chosen(0, "raw")
    if name == "best":
        record = read_selection(store, graph.node(SelectInputs).fingerprint)
        if record is None:
            raise Invalid("no checkpoint has been selected yet", hint=f"runner apply, or name a step: {listed}")
        return Chosen(record["chosen"]["step"], record["chosen"]["weights"])
    if name == "last" and steps:
        return Chosen(steps[-1], "raw")
    step, _, weights = name.partition(":")
    if step.isdigit():
        kind = weights or "raw"
        if not checkpoints.path(int(step), kind).is_file():
            raise Invalid(f"there is no checkpoint {name}", hint=listed)
        return Chosen(int(step), kind)
    file = Path(name)
    if not file.is_file():
        raise Invalid(
            f"there is no checkpoint or file {name!r}",
            hint=near_name(file) if file.suffix else f"say best, last, base, a step or a file; {listed}",
        )
    return Chosen(None, "file", file)


def run_checkpoints(store: Store, graph: Graph) -> Checkpoints:
    """The run's checkpoints, finished or in progress."""
    node = graph.node(TrainInputs)
    artifact, workspace = store.artifact(node.name, node.fingerprint), store.workspace(node.name, node.fingerprint)
    return Checkpoints((artifact if artifact.is_dir() else workspace) / "checkpoints", store.index.digest)


def load_weights(store: Store, graph: Graph, chosen: Chosen, train: TrainInputs) -> dict[str, Tensor] | None:
    """The tensors by parameter; None for the base model."""
    if chosen.file is None:
        assert chosen.step is not None
        return None if chosen.step == 0 else run_checkpoints(store, graph).load(chosen.step, chosen.weights)
    names = read_header(chosen.file).tensors
    if train.targets is not None and is_adapter_file(names):
        assert train.adapter is not None
        return read_adapters(chosen.file, train.targets, train.adapter.decompose_factor)
    return read_tensors(chosen.file, {name: name for name in names}, None)
