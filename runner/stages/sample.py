"""sample: the pictures of the base model and of each kept checkpoint that training has not already made."""

from __future__ import annotations

from runner.errors import Stopped
from runner.inputs.sample import SampleInputs, candidates
from runner.inputs.train import TrainInputs
from runner.stages.checkpoints import Checkpoints
from runner.stages.context import Context
from runner.stages.job import Job
from runner.stages.modules import build_swapped
from runner.stages.previews import Previews


def run_sample(
    context: Context, inputs: SampleInputs, train: TrainInputs, checkpoints: Checkpoints, text_trains: bool
) -> int:
    """Makes the missing pictures and returns how many there were. Raises `Stopped` when asked to stop."""
    previews = Previews(context, inputs, text_trains)
    wanted = candidates(inputs.steps, inputs.ema, with_base=True)
    context.store.index_existing(
        "samples", [inputs.key(prompt, *which) for which in wanted for prompt in previews.prompts]
    )
    missing = [(step, weights) for step, weights in wanted if previews.missing(step, weights)]
    if not missing:
        return 0
    total, made = sum(len(previews.missing(*which)) for which in missing), 0
    previews.encode()
    trained = build_swapped(context, train)
    for step, weights in missing:
        if step > 0:
            trained.assign(checkpoints.load(step, weights))
        made += previews.make(step, trained.modules, weights)
        context.events.emit("progress", done=made, total=total)
        if context.stop.is_set():
            raise Stopped(f"stopped while sampling: {made} of {total} pictures are kept", context.stop.code)
    return made


def run(job: Job, _: SampleInputs) -> None:
    """Makes the pictures with the seeds that are drawn by then."""
    job.draw_seeds()
    inputs, train = job.graph.of(SampleInputs), job.graph.of(TrainInputs)
    job.context.events.emit("started", total=len(inputs.prompts))
    run_sample(job.context, inputs, train, job.checkpoints(), bool(train.components.text_encoders))
