"""Rules of keys that count steps, against the length that the run really has: by then epochs are steps too."""

from __future__ import annotations

import math
from collections.abc import Iterator

from runner.config.locate import Path
from runner.config.optimizer_rules import long_warmup
from runner.config.source import Source
from runner.errors import Diagnostic
from runner.plan.resolve import Length, checkpoint_steps
from schemas import RunConfig


def step_rules(config: RunConfig, source: Source, length: Length) -> Iterator[Diagnostic]:
    """Findings about a resolved configuration. What is given and never comes is a warning; a warm-up that is never over
    is an error, because nothing would be trained as it was meant."""
    steps = length.steps
    yield from long_warmup(config, source, steps, _length(config, length))
    for path, every, what in _cadences(config, source):
        if every > steps:
            yield Diagnostic(
                f"`{path[-1]}` comes to {every:,} steps, and the run has {_length(config, length)}: {what}",
                source.key_places(path),
                f"{steps:,} steps at most",
                "warning",
            )
    boundaries = config.training.scheduler.args.get("boundaries")
    late = [step for step in boundaries if step >= steps] if isinstance(boundaries, list) else []
    if late:
        yield Diagnostic(
            f"boundary {late[0]:,} of the schedule is not reached: the run has {_length(config, length)}",
            source.value_places(("training", "scheduler", "args", "boundaries")),
            "",
            "warning",
        )
    yield from _manual(config, source, steps)


def _cadences(config: RunConfig, source: Source) -> Iterator[tuple[Path, int, str]]:
    """(key as it was given, steps, what a number above the run's length means)."""
    checkpoints, training = config.training.checkpoints, config.training
    candidates: list[tuple[Path, int | None, str]] = [
        (
            ("training", "checkpoints", "every_n_steps"),
            checkpoints.every_n_steps,
            "there will be one checkpoint, the last",
        ),
        (
            ("training", "checkpoints", "every_n_epochs"),
            checkpoints.every_n_steps,
            "there will be one checkpoint, the last",
        ),
        (("training", "checkpoints", "state_every_n_steps"), checkpoints.state_every_n_steps, "a kill costs all of it"),
        (("sampling", "every_n_steps"), config.sampling.every_n_steps, "no samples are made while it trains"),
        (("sampling", "every_n_epochs"), config.sampling.every_n_steps, "no samples are made while it trains"),
        (
            ("training", "ema", "update_every"),
            training.ema.update_every if training.ema else None,
            "the average never moves",
        ),
        (("training", "logging", "every_n_steps"), training.logging.every_n_steps, "the log has one line, the last"),
    ]
    for index, own in enumerate(config.dataset.sources):
        last = math.ceil(own.token_warmup_step)
        candidates.append((("dataset", "sources", index, "token_warmup_step"), last, "the last tags are never used"))
    for path, every, what in candidates:
        if every is not None and source.value(path) is not None:
            yield path, every, what


def _manual(config: RunConfig, source: Source, steps: int) -> Iterator[Diagnostic]:
    """A step to choose at which there is no checkpoint; a finished run may have others than are planned now."""
    step, every = config.selection.step, config.training.checkpoints.every_n_steps
    assert every is not None
    planned = checkpoint_steps(steps, every)
    if step is not None and step not in planned:
        near = sorted(sorted(planned, key=lambda other: abs(other - step))[:4])
        yield Diagnostic(
            f"no checkpoint is planned at step {step:,}",
            source.value_places(("selection", "step")),
            f"near it are {', '.join(map(str, near))}",
            "warning",
        )


def _length(config: RunConfig, length: Length) -> str:
    """`4`, or `4 (2 epochs of 2)`."""
    epochs = config.training.max_train_epochs
    if epochs is None:
        return f"{length.steps:,}"
    return f"{length.steps:,} ({epochs:,} epoch{'s' * (epochs != 1)} of {length.steps_per_epoch:,})"
