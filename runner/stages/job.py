"""What a stage runs with in an apply, beside its own inputs."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from runner.inputs.sample import SampleInputs
from runner.plan.compile import Graph
from runner.plan.current import current_graph, trained_folder
from runner.plan.diff import Planning
from runner.plan.prepare import Prepared
from runner.stages.checkpoints import Checkpoints
from runner.stages.context import Context
from runner.store.run_folder import SEEDS, read_drawn_seeds, write_drawn_seeds


@dataclass(kw_only=True)
class Job:
    """Shared by the stages of one apply."""

    context: Context
    prepared: Prepared
    """As it was given; `graph.prepared` has what stages found out."""
    graph: Graph
    until: str | None
    remember: Callable[[], None]
    """Writes down what this apply needs, after the graph has changed."""
    plan_text: str
    environment: dict[str, str]
    notes: list[str] = field(default_factory=list)
    """What is to be said at the end."""
    reading: set[str] = field(default_factory=set)
    """Stages that read encodings, whatever the plan says."""

    def planning(self) -> Planning:
        """The plan of what is there now."""
        planning = Planning(self.graph, self.until)
        planning.also = self.reading
        return planning

    def compile(self) -> None:
        """Makes the graph anew: something is known now, or other than was planned."""
        self.graph = current_graph(self.prepared)
        self.context.runtime = self.graph.runtime

    def again(self) -> None:
        """The same, and writes down what this apply needs now."""
        self.compile()
        self.remember()

    def checkpoints(self) -> Checkpoints:
        return Checkpoints(trained_folder(self.graph).checkpoints, self.context.store.index.digest)

    def draw_seeds(self) -> None:
        """Draws the seeds of -1, once for the run's life, and records them."""
        missing = [prompt.index for prompt in self.graph.of(SampleInputs).prompts if prompt.seed is None]
        if not missing:
            return
        seeds = read_drawn_seeds(self.prepared.output_dir)
        seeds |= {index: secrets.randbelow(SEEDS) for index in missing if index not in seeds}
        write_drawn_seeds(self.prepared.output_dir, seeds)
        self.prepared.prompts = [
            replace(prompt, seed=seeds[prompt.index]) if prompt.seed is None else prompt
            for prompt in self.prepared.prompts
        ]
        self.again()
