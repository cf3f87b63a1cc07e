"""What several verbs share: options, loading, preparing."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from runner.cli import out
from runner.errors import UsageError

if TYPE_CHECKING:
    from runner.config.load import Loaded
    from runner.plan.diff import Plan
    from runner.plan.estimate import Figures
    from runner.plan.prepare import Prepared
    from runner.store.store import Store

Function = TypeVar("Function", bound=Callable[..., Any])


class _Targets(click.Choice):
    """The stages that there are, looked up when they are asked for."""

    def __init__(self) -> None:
        self.case_sensitive = True

    @property
    def choices(self) -> tuple[str, ...]:  # type: ignore[override]
        from runner.plan.stages.registry import targets

        return targets()


run_file = click.argument("file", type=click.Path(path_type=Path), default=Path("run.toml"))
settings_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set a key over the file, e.g. training.learning_rate=1e-4.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Write a record for programs to stdout.")
target_option = click.option("--target", type=_Targets(), help="Stop after this stage.")


def memory_size(option: str, text: str) -> int:
    """Bytes of a GPU's memory as typed. Raises `UsageError` where it is none."""
    from runner.plan.fit import parse_memory

    size = parse_memory(text)
    if size is None:
        raise UsageError(f"{option} {text}: write it as 12GB", hint="from 1GB to 1TB, in GB, GiB or MB; 12 is 12GB")
    return size


def store_of(file: Path) -> Store:
    """The store of a run.toml."""
    from runner.store.store import find_store

    return find_store(file.absolute().parent)


def prepared_run(
    file: Path, settings: tuple[str, ...] = (), *, may_defer: bool = True, loaded: Loaded | None = None
) -> Prepared:
    """Loads and checks a run.toml with everything around it. Raises `InvalidConfig`."""
    from runner.config.load import load
    from runner.plan.prepare import prepare
    from runner.store.run_folder import read_drawn_seeds

    checked = loaded or load(file, settings)
    # This makes some ten lasting objects an item and no cycles; the collector would walk them again and again.
    gc.disable()
    try:
        return prepare(
            checked, store_of(file), progress=_reading_progress(), may_defer=may_defer, drawn_seeds=read_drawn_seeds
        )
    finally:
        gc.freeze()
        gc.enable()


def _reading_progress() -> Callable[[int, int], None] | None:
    """Shows how far reading the pictures is, on a terminal, where there are many unread ones."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        if total >= 200 and (done % 50 == 0 or done == total):
            end = "\n" if done == total else "\r"
            click.echo(f"reading pictures {done}/{total}", err=True, nl=False)
            click.echo(end, err=True, nl=False)

    return show


def plan_figures(plan: Plan, device: Literal["cpu", "cuda"] | None = None) -> Figures:
    """The plan's figures with this machine's measured step, where there is one; memory is of `device`, where it is not
    run.device that is asked about."""
    from runner.plan.estimate import figures
    from runner.plan.speed import step_key

    return figures(plan, plan.prepared.store.index.measured(step_key(plan.graph)), device)


def shown_plan(plan: Plan, figures: Figures) -> str:
    """The plan as text with colours."""
    from runner.plan.render import render_plan

    return render_plan(plan, figures, out.paint)
