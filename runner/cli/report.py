"""runner report."""

from __future__ import annotations

from pathlib import Path

import click

from runner.cli import out
from runner.cli.applied import applied_run
from runner.cli.common import plan_figures, run_file, settings_option
from runner.errors import Exit, Invalid


@click.command()
@run_file
@settings_option
def command(file: Path, settings: tuple[str, ...]) -> int:
    """Make strip.png and report.html again, of what FILE's run last applied, its --set included."""
    from runner.inputs.sample import SampleInputs
    from runner.inputs.select import SelectInputs
    from runner.inputs.train import TrainInputs
    from runner.plan.current import finished_training
    from runner.plan.diff import make_plan
    from runner.plan.render import render_plan
    from runner.report.write import write_report
    from runner.store.artifacts import read_selection
    from runner.store.lock import in_use
    from runner.store.lockfile import environment

    prepared = applied_run(file, settings, (TrainInputs, SampleInputs, SelectInputs))
    with in_use(prepared.store, "runner report"):
        plan = make_plan(prepared)
        selection = read_selection(prepared.store, plan.graph.node(SelectInputs).fingerprint)
        if finished_training(plan.graph) is None or selection is None:
            raise Invalid("there is no finished run of this configuration to report on", hint=f"runner apply {file}")
        text = render_plan(plan, plan_figures(plan))
        write_report(plan.graph, selection, text, environment(prepared.config.run.device))
    for name in ("strip.png", "report.html"):
        if (prepared.output_dir / name).exists():
            out.data(str(prepared.output_dir / name))
    return Exit.DONE
