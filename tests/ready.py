"""A run up to its first training step: encodings made, model loaded, on any device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from runner.core.events import Events
from runner.families.registry import family
from runner.inputs.cache import LatentsInputs, TextsInputs
from runner.inputs.select import SelectInputs
from runner.inputs.train import TrainInputs
from runner.plan.compile import Graph, compile_graph
from runner.plan.keys import training_texts, training_views
from runner.plan.prepare import Prepared
from runner.stages.context import Context
from runner.stages.encodings import Latents, Texts
from runner.stages.loader import Sources, StepLoader
from runner.stages.modules import Trained, build
from runner.stages.pictures import Encoded, encode_prompts
from runner.stages.score import Scorer
from runner.stages.task import DiffusionTask
from tests.inprocess import applied, prepared
from tests.support import Place


@dataclass
class Ready:
    """A run with its encodings made and its model loaded, as the training stage has them."""

    run: Prepared
    graph: Graph
    context: Context
    trained: Trained
    sources: Sources
    encoded: Encoded
    scorer: Scorer

    def task(self) -> tuple[DiffusionTask, StepLoader]:
        """The training task, in training mode, and its batches."""
        loader = StepLoader(self.graph.of(TrainInputs), self.sources, 0)
        task = DiffusionTask(self.context, self.graph.of(TrainInputs), self.trained, loader, None, None)
        task.train_mode(True)
        return task, loader


def ready(place: Place, device: torch.device) -> Ready:
    """Encodes on the CPU and moves what trains to `device`."""
    applied(place.file, until="cache")
    run = prepared(place.file)
    graph = compile_graph(run)
    events = Events(place.folder / "events.jsonl", ())
    own = family(run.spec.name)
    context = Context(
        family=own,
        store=run.store,
        runtime=graph.runtime,
        numerics=graph.of(TrainInputs).numerics,
        device=torch.device("cpu"),
        events=events,
    )
    guidance = context.numerics.guidance
    latents, texts = Latents(context, graph.of(LatentsInputs).encoder), Texts(context, graph.of(TextsInputs).encoder)
    sources = Sources(
        latents=latents.ready(training_views(graph.of(TrainInputs).items, 42)),
        latent_key=latents.key,
        latent_shape=lambda item: graph.runtime.model.latent_shape(
            item.fit.bucket, item.latent_frames(graph.runtime.model.frame_factor)
        ),
        texts=texts.ready(training_texts(graph.of(TrainInputs).items, 42)),
        text_key=texts.key,
        learned=lambda item, view, encoding: own.learned(item, view, guidance, encoding),
        discrete=own.process(graph.of(TrainInputs).numerics).prediction_type != "flow",
        shift_points=own.spec.shift_points,
    )
    encoded = encode_prompts(context, [replace(prompt, seed=1) for prompt in run.prompts], True)
    scorer = Scorer.prepare(
        context, graph.of(SelectInputs), (graph.of(LatentsInputs).encoder, graph.of(TextsInputs).encoder), False
    )
    trained = build(context, graph.of(TrainInputs), None)
    for module in trained.modules.values():
        module.to(device)
    there = replace(context, device=device)
    scorer.context = there
    return Ready(run, graph, there, trained, sources, encoded, scorer)
