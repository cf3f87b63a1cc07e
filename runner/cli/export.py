"""runner export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from runner.cli import out
from runner.cli.applied import applied_run, stages_of
from runner.cli.common import run_file, settings_option
from runner.errors import Exit, Invalid, UsageError

if TYPE_CHECKING:
    from runner.plan.prepare import Prepared


@click.command()
@run_file
@settings_option
@click.option("--format", "form", type=click.Choice(["kohya", "diffusers", "comfyui", "single_file"]), required=True)
@click.option(
    "--to",
    "target",
    type=click.Path(path_type=Path),
    required=True,
    help="The file, or the folder for a whole diffusers model.",
)
@click.option("--checkpoint", default="best", help="best, last or a step (50, 50:ema).")
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), help="Unset: training.checkpoints.dtype.")
def command(file: Path, settings: tuple[str, ...], form: str, target: Path, checkpoint: str, dtype: str | None) -> int:
    """Write a checkpoint of what FILE's run last applied, its --set included, as other programs load it.

    An existing file is not overwritten.
    """
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise UsageError(f"{target} is there already; it is not overwritten", hint="name another place")
    prepared = applied_run(file, settings, stages_of(checkpoint))
    from runner.atomic import copy_file, copy_tree
    from runner.core.process import prepare_environment
    from runner.store.lock import in_use

    prepare_environment(prepared.config.run.deterministic)
    with in_use(prepared.store, "runner export"):
        made = _made(prepared, form, checkpoint, dtype)
        if made.is_dir():
            copy_tree(made, target)
        else:
            copy_file(made, target)
    out.data(str(target))
    return Exit.DONE


def _made(prepared: Prepared, form: str, checkpoint: str, dtype: str | None) -> Path:
    """The export in the store."""
    from runner.core.events import Events
    from runner.execute.apply import Apply
    from runner.execute.checkpoint import find_checkpoint, run_checkpoints
    from runner.execute.export import Exporter
    from runner.inputs.train import TrainInputs
    from runner.stages.stop import StopFlag

    session = Apply(prepared, Events(None), StopFlag(), None, "")
    chosen = find_checkpoint(prepared.store, session.graph, checkpoint)
    if not chosen.step:
        raise Invalid("only a checkpoint of the run can be exported", hint="say best, last or a step")
    checkpoints = run_checkpoints(prepared.store, session.graph)
    node = session.graph.node(TrainInputs)
    train = session.graph.of(TrainInputs)
    exporter = Exporter(session.context, session.graph.prepared, train, checkpoints, node.fingerprint)
    return exporter.export(chosen.step, chosen.weights, form, dtype or prepared.config.training.checkpoints.dtype)
