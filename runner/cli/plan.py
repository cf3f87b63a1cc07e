"""runner plan."""

from __future__ import annotations

from pathlib import Path

import click

from runner.cli import out
from runner.cli.common import (
    json_option,
    memory_size,
    plan_figures,
    prepared_run,
    run_file,
    settings_option,
    shown_plan,
    target_option,
)
from runner.errors import Exit, UsageError


@click.command()
@run_file
@settings_option
@json_option
@target_option
@click.option(
    "--out", "out_file", type=click.Path(path_type=Path), help="Also write the plan to a file for `runner apply`."
)
@click.option(
    "--fit", "memory", metavar="SIZE", help="Propose the fastest settings that fit into a GPU's memory, e.g. 12GB."
)
@click.option("--detailed-exitcode", is_flag=True, help="Exit with 2 where something is to be done.")
def command(
    file: Path,
    settings: tuple[str, ...],
    as_json: bool,
    target: str | None,
    out_file: Path | None,
    memory: str | None,
    detailed_exitcode: bool,
) -> int:
    """Show what `runner apply FILE` would do, and why. Changes nothing but the index of files it has read."""
    from runner.plan.diff import make_plan
    from runner.plan.fit import fit
    from runner.plan.planfile import write_plan_file
    from runner.plan.render import plan_record, render_fit

    if out_file is not None and out_file.resolve() == file.resolve():
        raise UsageError(f"--out {out_file} is the run itself", hint="name another file, plan.json for instance")
    limit = None if memory is None else memory_size("--fit", memory)
    plan = make_plan(prepared_run(file, settings), target)
    figures = plan_figures(plan, None if limit is None else "cuda")
    record = plan_record(plan, figures)
    found = None if limit is None else fit(plan, limit)
    if found is not None:
        record["fit"] = found.as_record()
    if out_file is not None:
        write_plan_file(out_file, file, settings, target, record)
    if as_json:
        out.record(record)
    else:
        out.data(shown_plan(plan, figures))
        if found is not None:
            out.data(render_fit(found))
        if out_file is not None:
            out.say(f"written to {out_file}; apply it with: runner apply {out_file}")
    return Exit.CHANGES_PENDING if detailed_exitcode and plan.pending else Exit.DONE
