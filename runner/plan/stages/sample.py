"""sample: the pictures and videos of the base model and of each kept checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

from runner.inputs.sample import SAMPLE_VERSION, SampleInputs, candidates
from runner.plan.compile import Graph, Run
from runner.plan.diff import Plan, Planning
from runner.plan.resolve import checkpoint_steps
from runner.plan.stage import Action, Stage
from runner.plan.stages.train import TRAIN

PNG_SHARE = 0.55
"""A sample's PNG against its pixels' bytes."""
MP4_SHARE = 0.08
"""Bytes of a video for each pixel of each frame; an estimate, moving noise takes ten times as much."""
SAMPLE_OVERHEAD = 1000
"""Bytes of a sample's settings in its file."""


class Sample(Stage[SampleInputs]):
    """The pictures that the strip shows."""

    name = "sample"
    version = SAMPLE_VERSION
    follows: ClassVar[tuple[str, ...]] = (TRAIN.name,)
    address = "runner.stages.sample:run"
    again = "samples are made again"

    def inputs(self, run: Run) -> SampleInputs:
        config = run.config
        return SampleInputs(
            trajectory=run.trajectory,
            base=run.base,
            steps=run.steps,
            ema=config.training.ema is not None,
            prompts=tuple(run.prepared.prompts),
            numerics=run.numerics,
            frozen={**run.picture_weights, **run.text_weights},
            prompt_weighting=config.sampling.prompt_weighting,
            tile_size=config.sampling.vae_tile_size or config.caching.vae_tile_size,
        )

    def pending(self, inputs: SampleInputs, planning: Planning) -> Action:
        prompts, checkpoints = len(inputs.prompts), len(inputs.steps) * (2 if inputs.ema else 1) + 1
        if prompts == 0:
            return Action(node=self.name, symbol="=", summary="no prompts")
        total = prompts * checkpoints
        moving = {prompt.is_video for prompt in inputs.prompts}
        made = "videos" if moving == {True} else "pictures" if moving == {False} else "pictures and videos"
        if any(prompt.seed is None for prompt in inputs.prompts):
            return Action(
                node=self.name,
                symbol="+",
                summary=f"make {total} {made}; seeds of -1 are drawn",
                total=total,
                missing=total,
            )
        store = planning.store
        indexed, keys = store.index.item_keys("samples"), self.keys(inputs, planning.graph)["samples"]
        missing = sum(1 for key in keys if key not in indexed or not store.item("samples", key).is_file())
        if missing == 0:
            return Action(node=self.name, symbol="=", summary=f"all {total} {made} are made", total=total)
        reasons = [] if planning.action(TRAIN.name).pending else planning.reasons(self.name)
        listed = f"{prompts} prompt{'s' * (prompts != 1)} x {checkpoints} columns (base and checkpoints)"
        reuse = f", reuse {total - missing}" if missing < total else ""
        return Action(
            node=self.name,
            symbol="+" if missing == total else "~",
            summary=f"make {missing} of {total} {made}{reuse}: {listed}",
            reasons=reasons,
            total=total,
            missing=missing,
        )

    def keys(self, inputs: SampleInputs, graph: Graph) -> Mapping[str, Iterable[str]]:
        which = candidates(inputs.steps, inputs.ema, with_base=True)
        prompts = [prompt for prompt in inputs.prompts if prompt.seed is not None]
        made = [(prompt, inputs.key(prompt, *candidate)) for candidate in which for prompt in prompts]
        videos = [key for prompt, key in made if prompt.is_video]
        return {"samples": [key for _, key in made], "videos": videos, "settings": videos}

    def disk(self, inputs: SampleInputs, plan: Plan) -> Mapping[str, int]:
        """Of those that are missing: of the base model, of each checkpoint, and those between them."""
        runtime, own = plan.graph.runtime, plan.actions[self.name]
        if not inputs.prompts or not own.pending:
            return {}
        between, every = 0, runtime.sample_every
        if plan.actions[TRAIN.name].pending and every is not None:
            steps = plan.prepared.length.steps
            saved = set(checkpoint_steps(steps, runtime.checkpoint_every))
            between = sum(step not in saved for step in range(every, steps + 1, every))
        each = SAMPLE_OVERHEAD * len(inputs.prompts)
        for prompt in inputs.prompts:
            pixels = prompt.width * prompt.height
            each += int(pixels * 3 * PNG_SHARE) + (int(pixels * prompt.frames * MP4_SHARE) if prompt.is_video else 0)
        made = int((own.missing / len(inputs.prompts) + between) * each)
        return {"samples": made} if made else {}


SAMPLE = Sample()
