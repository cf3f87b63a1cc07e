"""select: the measurement of each candidate, and the choice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from runner.errors import Diagnostic, Invalid, InvalidConfig
from runner.inputs.sample import candidates
from runner.inputs.select import JUDGE_VERSION, LEAST_FOR_ERROR, SelectInputs
from runner.plan.compile import Graph, Run
from runner.plan.diff import Planning
from runner.plan.keys import evaluation_texts, evaluation_views
from runner.plan.resolve import checkpoint_steps
from runner.plan.stage import Action, Reads, Stage, Told
from runner.plan.stages.sample import SAMPLE
from runner.plan.stages.train import TRAIN
from runner.store.artifacts import read_selection
from runner.store.run_folder import PIN


class Select(Stage[SelectInputs]):
    """The choice of a checkpoint."""

    name = "select"
    version = JUDGE_VERSION
    follows: ClassVar[tuple[str, ...]] = (TRAIN.name, SAMPLE.name)
    address = "runner.stages.select:run"
    again = "the choice is made again"

    def inputs(self, run: Run) -> SelectInputs:
        selection, config = run.config.selection, run.config
        pictures = run.nodes[SAMPLE.name].facts if selection.veto.max_similarity is not None else {}
        return SelectInputs(
            trajectory=run.trajectory,
            base=run.base,
            steps=run.steps,
            ema=config.training.ema is not None,
            seed=config.run.seed,
            strategy=selection.strategy,
            metrics=tuple(selection.metrics),
            step=selection.step,
            pinned=run.pinned,
            veto=selection.veto,
            held_out=tuple(run.prepared.collection.held_out),
            compared=run.compared,
            numerics=run.numerics,
            encoders=(run.latent_encoder, run.text_encoder),
            pictures=pictures,
            known_after=run.prepared.known_after,
        )

    def pending(self, inputs: SelectInputs, planning: Planning) -> Action:
        self._manual(inputs, planning)
        count = len(inputs.steps) * (2 if inputs.ema else 1)
        train = planning.action(TRAIN.name)
        record = read_selection(planning.store, planning.graph.fingerprint(self.name))
        if not train.pending and record is not None:
            return Action(node=self.name, symbol="=", summary="chosen: " + chosen_text(record))
        present = planning.store.index.item_keys("scores")
        missing = 0
        if inputs.metrics:
            missing = sum(key not in present for key in self.keys(inputs, planning.graph)["scores"])
        items = (
            f"{len(inputs.held_out)} held-out items"
            if inputs.held_out
            else f"{len(inputs.compared)} training items (nothing is held out)"
        )
        measured = len(inputs.held_out) or len(inputs.compared)
        if inputs.strategy == "best" and measured < LEAST_FOR_ERROR:
            items += f", fewer than {LEAST_FOR_ERROR}: the lowest loss decides"
        how = f"measure {missing} of {count + 1} on {items}" if inputs.metrics else "nothing is measured"
        reasons = [] if train.pending else planning.reasons(self.name)
        summary = f"choose among {count} candidates; {how}"
        return Action(node=self.name, symbol="+", summary=summary, reasons=reasons, total=count + 1, missing=missing)

    def _manual(self, inputs: SelectInputs, planning: Planning) -> None:
        """A checkpoint to choose that is not there, or will not be made. Raises `InvalidConfig`."""
        train = planning.action(TRAIN.name)
        if inputs.pinned is not None and not train.pending:
            self._pinned(inputs, planning)
        if inputs.strategy != "manual" or inputs.pinned is not None or inputs.step in inputs.steps:
            return
        every, steps_ = planning.graph.runtime.checkpoint_every, planning.prepared.length.steps
        if train.pending and inputs.step in checkpoint_steps(steps_, every):
            return  # of those before the newest `keep` the best stays
        there = "will be" if train.pending else "is"
        steps = ", ".join(map(str, inputs.steps[-20:]))
        raise InvalidConfig(
            [
                Diagnostic(
                    f"there {there} no checkpoint at step {inputs.step}",
                    planning.prepared.source.value_places(("selection", "step")),
                    f"checkpoints are at steps {steps}",
                )
            ]
        )

    def _pinned(self, inputs: SelectInputs, planning: Planning) -> None:
        """Raises `Invalid` for a choice by hand of what this training has not."""
        assert inputs.pinned is not None
        step, weights = inputs.pinned["step"], inputs.pinned["weights"]
        if step not in inputs.steps or (weights == "ema" and not inputs.ema):
            raise Invalid(
                f"{planning.prepared.output_dir / PIN} chooses what this training has not: checkpoint {step} ({weights})",
                hint="delete it, or choose again with `runner select --step`; "
                f"checkpoints are at steps {', '.join(map(str, inputs.steps[-20:]))}",
            )

    def reads(self, inputs: SelectInputs) -> Reads:
        if not inputs.metrics:
            return Reads()
        items = (*inputs.held_out, *inputs.compared)
        return Reads(evaluation_views(items), evaluation_texts(items, inputs.seed))

    def reads_now(self, action: Action) -> bool:
        return action.missing > 0

    def keys(self, inputs: SelectInputs, graph: Graph) -> Mapping[str, Iterable[str]]:
        return {"scores": [inputs.score_key(*which) for which in candidates(inputs.steps, inputs.ema, with_base=True)]}

    def told(self, inputs: SelectInputs, graph: Graph) -> Told:
        record = read_selection(graph.prepared.store, graph.fingerprint(self.name))
        if record is None:
            return Told()
        chosen = record["chosen"]
        suffix = "" if chosen["weights"] == "raw" else f" {chosen['weights']}"
        return Told([("chosen checkpoint", f"step {chosen['step'] or 'base'}{suffix}")])


def chosen_text(record: dict[str, Any]) -> str:
    """`step 300 (lowest stable loss, 0.05)`."""
    chosen = record["chosen"]
    suffix = "" if chosen["weights"] == "raw" else f" {chosen['weights']}"
    return f"step {chosen['step']}{suffix} ({record['reason']})"


SELECT = Select()
