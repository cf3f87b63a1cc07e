"""runner report."""

from __future__ import annotations

from pathlib import Path

import click

from runner.cli import out
from runner.cli.common import plan_figures, prepared_run, run_file
from runner.errors import Exit, Invalid


@click.command()
@run_file
def command(file: Path) -> int:
    """Make strip.png and report.html of a finished run again."""
    from runner.plan.diff import finished_training, make_plan
    from runner.plan.render import render_plan
    from runner.report.write import write_report
    from runner.store.artifacts import read_selection
    from runner.store.lockfile import environment

    prepared = prepared_run(file)
    plan = make_plan(prepared)
    trained = finished_training(prepared, plan.graph)
    selection = read_selection(prepared.store, plan.graph.fingerprint("select"))
    if trained is None or selection is None:
        raise Invalid("there is no finished run of this configuration to report on", hint=f"runner apply {file}")
    write_report(
        prepared,
        plan.graph,
        selection,
        trained,
        render_plan(plan, plan_figures(plan)),
        environment(prepared.config.run.device),
    )
    for name in ("strip.png", "report.html"):
        if (prepared.output_dir / name).exists():
            out.data(str(prepared.output_dir / name))
    return Exit.DONE
