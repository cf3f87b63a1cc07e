"""runner select."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from runner.cli import out
from runner.cli.applied import applied_run, run_of
from runner.cli.common import json_option, plan_figures, run_file, settings_option
from runner.errors import Exit, Invalid

if TYPE_CHECKING:
    from runner.plan.prepare import Prepared


@click.command()
@run_file
@settings_option
@click.option("--step", type=click.IntRange(1), help="Take this checkpoint, whatever the rule says.")
@click.option(
    "--weights", type=click.Choice(["raw", "ema"]), default="raw", help="The trained weights or their average."
)
@json_option
def command(file: Path, settings: tuple[str, ...], step: int | None, weights: str, as_json: bool) -> int:
    """Choose a checkpoint by hand (--step), or again by the rule; strip, report and published files follow.

    It is chosen among the checkpoints of what FILE's run last applied, its --set included.
    """
    from runner.inputs.train import TrainInputs
    from runner.plan.current import current_graph, finished_training
    from runner.store.lock import run_held
    from runner.store.run_folder import clear_pin, write_pin

    store, output, name = run_of(file, settings)
    with run_held(store, output, name):
        prepared = applied_run(file, settings, (TrainInputs,))
        graph = current_graph(prepared)
        trained = finished_training(graph)
        if trained is None:
            raise Invalid("training is not finished, there is nothing to choose from", hint=f"runner apply {file}")
        if step is None:
            clear_pin(prepared.output_dir)
        else:
            steps = trained.checkpoint_steps()
            known = (trained.checkpoints / f"step-{step:08d}" / f"{weights}.safetensors").is_file()
            if not known:
                raise Invalid(
                    f"there is no checkpoint {step} ({weights})",
                    hint=f"checkpoints are at steps {', '.join(map(str, steps))}",
                )
            write_pin(prepared.output_dir, step, weights, graph.node(TrainInputs).fingerprint)
        return _choose(file, prepared, as_json)


def _choose(file: Path, prepared: Prepared, as_json: bool) -> int:
    from runner.cli.apply import carry_out
    from runner.cli.lock import save_lock
    from runner.plan.diff import make_plan
    from runner.plan.render import render_plan
    from runner.plan.stages.select import chosen_text

    plan = make_plan(prepared)
    outcome = carry_out(prepared, None, render_plan(plan, plan_figures(plan)))
    assert outcome.selection is not None
    save_lock(file, tuple(prepared.source.overrides.values()), prepared, outcome)
    if as_json:
        out.record(outcome.selection)
    else:
        out.data(f"chosen: {chosen_text(outcome.selection)}")
    return Exit.DONE
