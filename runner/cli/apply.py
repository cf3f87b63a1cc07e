"""runner apply."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from runner.cli import out
from runner.cli.common import plan_figures, prepared_run, run_file, settings_option, shown_plan, target_option
from runner.cli.lock import check_device, check_lock, save_lock
from runner.errors import Exit, UsageError

if TYPE_CHECKING:
    from runner.execute.apply import Outcome
    from runner.plan.diff import Plan
    from runner.plan.prepare import Prepared


@click.command()
@run_file
@settings_option
@target_option
@click.option("--locked", is_flag=True, help="Refuse (exit 4) where anything differs from run.lock.")
@click.option(
    "--yes", is_flag=True, help="Do not ask before the run trains anew; what it has trained stays in the store."
)
def command(file: Path, settings: tuple[str, ...], target: str | None, locked: bool, yes: bool) -> int:
    """Carry out the plan of FILE (a run.toml, or a plan.json from `runner plan --out`)."""
    from runner.plan.diff import make_plan
    from runner.plan.planfile import check_current, read_plan_file

    if locked and settings:
        raise UsageError(
            "--set is refused under --locked", hint="write the value into run.toml and apply without --locked"
        )
    saved = read_plan_file(file) if file.suffix == ".json" else None
    if saved is not None:
        if settings or target:
            raise UsageError("a plan.json is applied as it is: --set and --target belong to `runner plan --out`")
        file, settings, target = saved.run_file, saved.settings, saved.target
    from runner.store.lock import run_held

    first = prepared_run(file, settings, may_defer=True)
    with run_held(first.store, first.output_dir, first.config.run.name):
        prepared = prepared_run(file, settings, may_defer=False) if first.deferred else first
        plan = make_plan(prepared, target)
        if saved is not None:
            check_current(saved, plan)
        locked_device = check_lock(prepared, plan) if locked else None
        return _ask_and_run(file, settings, target, plan, yes, locked_device)


def _ask_and_run(
    file: Path, settings: tuple[str, ...], target: str | None, plan: Plan, yes: bool, locked_device: str | None
) -> int:
    from runner.plan.history import remember_given
    from runner.plan.render import duration, render_plan
    from runner.store.tidy import tidy

    prepared = plan.prepared
    if not plan.pending:
        tidy(prepared.store, prepared.output_dir)
        if target is None:
            remember_given(prepared)
        out.say("Nothing to do: everything is up to date.")
        _show_results(prepared)
        return Exit.DONE
    figures = plan_figures(plan)
    out.say(shown_plan(plan, figures))
    if plan.throws_away and not yes:
        if not sys.stdin.isatty():
            raise UsageError(
                f"this would train anew, and {plan.throws_away} give way in the run's folder",
                hint="say --yes to do it without asking; they stay in the store until `runner gc --delete`",
            )
        question = f"{plan.throws_away} give way in the run's folder and stay in the store. Train anew?"
        if not click.confirm(question, err=True):
            out.say("Nothing was done.")
            return Exit.USAGE
    outcome = carry_out(prepared, target, render_plan(plan, figures), locked_device, yes)
    took = [f"{name} {duration(time)}" for name, time in outcome.seconds.items() if plan.actions[name].pending]
    out.say(f"time: {', '.join(took)}")
    for note in outcome.notes:
        out.say(f"note: {note}")
    if outcome.published and locked_device is None:
        save_lock(file, settings, prepared, outcome)
    if outcome.selection is not None:
        from runner.plan.stages.select import chosen_text

        out.say(f"chosen: {chosen_text(outcome.selection)}")
        _show_results(prepared)
    return Exit.DONE


def carry_out(
    prepared: Prepared, target: str | None, plan_text: str, locked_device: str | None = None, agreed: bool = True
) -> Outcome:
    """Runs the stages with signals, progress and the log around them. Raises `LockedDiffers` on another device."""
    from runner.core.process import prepare_environment

    prepare_environment(prepared.config.run.deterministic)
    from runner.cli.progress import TensorBoard, make_progress
    from runner.cli.signals import stop_on_signals
    from runner.core.events import Events

    logs = prepared.output_dir / "logs"
    events = Events(logs / "events.jsonl")
    with stop_on_signals() as stop, make_progress() as progress:
        progress.note("loading libraries")
        from runner.execute.apply import Apply

        events.listeners.append(progress.hear)
        board = TensorBoard(logs / "tensorboard") if prepared.config.training.logging.tensorboard else None
        if board is not None:
            events.listeners.append(board.hear)
        try:
            application = Apply(prepared, events, stop, target, plan_text, agreed)
            if locked_device is not None:
                check_device(locked_device, application.environment["device"])
            outcome = application.run()
            events.stage = "run"
            events.emit("finished")
            return outcome
        except BaseException as error:
            with suppress(OSError):  # else it would hide why the run ended
                events.emit("ended", reason=type(error).__name__, text=str(error)[:2000])
            raise
        finally:
            events.close()
            if board is not None:
                board.close()


def _show_results(prepared: Prepared) -> None:
    """Where to look, to stdout."""
    for name in ("strip.png", "report.html", "best.safetensors"):
        path = prepared.output_dir / name
        if path.exists():
            out.data(str(path))
