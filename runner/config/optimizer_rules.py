"""Rules of the optimizer, the schedule and their arguments; each finding shows every place involved."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from runner.config.foreign_values import foreign_value
from runner.config.locate import Path
from runner.config.optimizer_kinds import (
    OPTIMIZERS,
    POLYNOMIAL_END,
    SCHEDULES,
    Argument,
    OptimizerKind,
    class_problem,
    finds_rate,
    is_schedule_free,
)
from runner.config.source import Source, conflict
from runner.errors import Diagnostic
from schemas import RunConfig

_TYPE: Path = ("training", "optimizer", "type")
_RATE: Path = ("training", "learning_rate")
_SCHEDULE = ("type", "warmup_steps", "warmup_ratio")


def optimizer_rules(config: RunConfig, source: Source) -> Iterator[Diagnostic]:
    optimizer = config.training.optimizer
    kind = OPTIMIZERS.get(optimizer.type)
    if kind is None:
        problem = class_problem(optimizer.type)
        if problem is not None:
            near = difflib.get_close_matches(optimizer.type.lower(), OPTIMIZERS, 1, 0.6)
            yield Diagnostic(
                problem,
                source.value_places(_TYPE),
                foreign_value("training.optimizer.type", optimizer.type)
                or (f'did you mean "{near[0]}"?' if near else None)
                or f"there are {', '.join(OPTIMIZERS)}, and installed classes by full name",
            )
    else:
        yield from _arguments(config, source, kind)
    yield from _single_tensors(config, source)
    yield from _own_rates(config, source)


def _arguments(config: RunConfig, source: Source, kind: OptimizerKind) -> Iterator[Diagnostic]:
    optimizer = config.training.optimizer
    if kind.package is not None and importlib.util.find_spec(kind.package) is None:
        yield Diagnostic(
            f'the optimizer "{optimizer.type}" needs the package {kind.package}, which is not installed',
            source.value_places(_TYPE),
            f'pip install {kind.package}, or use "adamw"',
        )
    for name in ("betas", "eps", "weight_decay"):
        if getattr(optimizer, name) is not None and name not in kind.defaults:
            yield Diagnostic(
                f'the optimizer "{optimizer.type}" has no `{name}`',
                source.key_places(("training", "optimizer", name)),
                "take it out",
            )
    for name, value in optimizer.args.items():
        path: Path = ("training", "optimizer", "args", name)
        if name not in kind.args:
            yield Diagnostic(
                f'the optimizer "{optimizer.type}" has no argument `{name}`',
                source.key_places(path),
                f"it takes {', '.join(sorted(kind.args))}; {' and '.join(kind.defaults)} are keys of [training.optimizer]",
            )
        elif not kind.args[name].takes(value):
            yield _unfit(source, path, "optimizer", kind.args[name], value)


def _unfit(source: Source, path: Path, owner: str, argument: Argument, value: Any) -> Diagnostic:
    name = path[-1] if isinstance(path[-1], str) else f"number {path[-1] + 1}"
    message = f"`{name}` of the {owner} must be {argument.words}, not {_shown(value)}"
    return Diagnostic(message, source.value_places(path))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def _single_tensors(config: RunConfig, source: Source) -> Iterator[Diagnostic]:
    """Optimizers that look at all tensors at once cannot step one of them alone."""
    optimizer, memory = config.training.optimizer, config.training.memory
    keys: dict[Path, bool] = {
        ("training", "memory", "fused_backward"): memory.fused_backward,
        ("training", "memory", "optimizer_offload"): memory.optimizer_offload,
        ("training", "optimizer", "stochastic_rounding"): optimizer.stochastic_rounding,
    }
    given = [path for path, on in keys.items() if on]
    if not given:
        return
    if is_schedule_free(optimizer.type):
        why = "changes between two sets of weights"
    elif finds_rate(optimizer.type):
        why = "finds one learning rate from all tensors together"
    else:
        return
    yield conflict(
        source,
        f"{optimizer.type} {why} and cannot work tensor by tensor, as {' and '.join(str(path[-1]) for path in given)} would have it",
        [_TYPE, *given],
        "use adamw with fused_backward, optimizer_offload and stochastic_rounding",
    )


def _own_rates(config: RunConfig, source: Source) -> Iterator[Diagnostic]:
    """Optimizers that find their learning rate, or its course, themselves."""
    training, network, kind = config.training, config.network, config.training.optimizer.type
    rates = {training.learning_rate if value is True else float(value) for value in training.components.rates.values()}
    plus = network is not None and network.lora_plus_ratio != 1
    known = OPTIMIZERS.get(kind)
    if known is not None and known.one_rate and plus:
        yield conflict(
            source,
            f'the optimizer "{kind}" finds one learning rate for everything; lora_plus_ratio would be a second one',
            [_TYPE, ("network", "lora_plus_ratio")],
            "take lora_plus_ratio out, or use adamw",
        )
    if known is not None and known.one_rate and len(rates) > 1:
        yield conflict(
            source,
            f'the optimizer "{kind}" finds one learning rate for everything; components cannot have their own',
            [_TYPE, ("training", "components")],
            "set the components to true",
        )
    if finds_rate(kind) and training.learning_rate < 0.1:
        yield Diagnostic(
            f"{kind} finds the learning rate itself and multiplies it by learning_rate = {training.learning_rate:g}",
            source.key_places(_RATE),
            "set learning_rate = 1",
            "warning",
        )
    relative = training.optimizer.args.get("relative_step") is True
    if training.optimizer.args.get("warmup_init") is True and not relative and kind == "adafactor":
        path: Path = ("training", "optimizer", "args", "warmup_init")
        yield Diagnostic(
            "`warmup_init` is the warm-up of relative_step, which is off",
            source.key_places(path),
            "set relative_step = true too, or take warmup_init out and set scheduler.warmup_steps",
        )
    if relative:
        given: list[Path] = [_RATE] if source.value(_RATE) is not None else []
        given += [
            ("training", "components", name) for name, value in training.components.rates.items() if value is not True
        ]
        given += [("network", "lora_plus_ratio")] if plus else []
        given += _scheduled(config)
        if given:
            yield conflict(
                source,
                f"with relative_step {kind} finds the size of its steps itself; {_listed(given)} would do nothing",
                [("training", "optimizer", "args", "relative_step"), *given],
                "take them out, or set relative_step = false (warmup_init = true is its own warm-up)",
            )
    elif is_schedule_free(kind) and _scheduled(config):
        yield conflict(
            source,
            f"{kind} averages its weights in place of a schedule; {_listed(_scheduled(config))} would bend the average",
            [_TYPE, *_scheduled(config)],
            "take [training.scheduler] out; optimizer.args = { warmup_steps = 100 } is its own warm-up",
        )


def _scheduled(config: RunConfig) -> list[Path]:
    """The keys that make the learning rate change."""
    scheduler = config.training.scheduler
    values = {
        "type": scheduler.type != "constant",
        "warmup_steps": scheduler.warmup_steps,
        "warmup_ratio": scheduler.warmup_ratio,
    }
    return [("training", "scheduler", name) for name in _SCHEDULE if values[name]]


def _listed(paths: list[Path]) -> str:
    return " and ".join(f"`{'.'.join(map(str, path[1:]))}`" for path in paths)


def schedule_rules(config: RunConfig, source: Source) -> Iterator[Diagnostic]:
    training, scheduler = config.training, config.training.scheduler
    allowed = SCHEDULES[scheduler.type]
    wrong = False
    for name, value in scheduler.args.items():
        path: Path = ("training", "scheduler", "args", name)
        if name not in allowed:
            listed = ", ".join(sorted(allowed)) or "no arguments"
            yield Diagnostic(
                f'the schedule "{scheduler.type}" has no argument `{name}`',
                source.key_places(path),
                f"it takes {listed}",
            )
        elif scheduler.type != "piecewise" and not allowed[name].takes(value):
            wrong = True
            yield _unfit(source, path, f'schedule "{scheduler.type}"', allowed[name], value)
    if training.max_train_steps is not None:
        yield from long_warmup(config, source, training.max_train_steps, f"{training.max_train_steps:,}")
    if scheduler.type == "piecewise":
        yield from _piecewise(scheduler.args, source)
    if scheduler.type == "polynomial" and not wrong:
        end = scheduler.args.get("lr_end", POLYNOMIAL_END)
        assert isinstance(end, (int, float))
        if end >= training.learning_rate:
            yield conflict(
                source,
                f'the schedule "polynomial" falls to lr_end = {end:g}, which is not below learning_rate = {training.learning_rate:g}',
                [
                    path
                    for path in (("training", "scheduler", "args", "lr_end"), _RATE)
                    if source.value(path) is not None
                ]
                or [("training", "scheduler", "type")],
                "lower lr_end; it is a learning rate, not a share",
            )


def long_warmup(config: RunConfig, source: Source, steps: int, said: str) -> Iterator[Diagnostic]:
    """A warm-up, the schedule's or the optimizer's own, that is not over when the run is."""
    training = config.training
    warmups: dict[Path, Any] = {
        ("training", "scheduler", "warmup_steps"): training.scheduler.warmup_steps,
        ("training", "optimizer", "args", "warmup_steps"): training.optimizer.args.get("warmup_steps"),
    }
    for path, warmup in warmups.items():
        if isinstance(warmup, int) and warmup > steps:
            length: list[Path] = [("training", name) for name in ("max_train_steps", "max_train_epochs")]
            yield conflict(
                source,
                f"the warm-up of {warmup:,} steps is longer than the run of {said}",
                [path, *(other for other in length if source.value(other) is not None)],
                "shorten the warm-up",
            )


def _piecewise(args: dict[str, Any], source: Source) -> Iterator[Diagnostic]:
    boundaries, factors = args.get("boundaries"), args.get("factors")
    if not isinstance(boundaries, list) or not isinstance(factors, list) or len(factors) != len(boundaries) + 1:
        yield Diagnostic(
            'the schedule "piecewise" needs `boundaries` and one more of `factors`',
            source.value_places(("training", "scheduler", "type")),
            "args = { boundaries = [1000, 2000], factors = [1.0, 0.1, 0.01] }",
        )
        return
    for name, values in (("boundaries", boundaries), ("factors", factors)):
        argument = SCHEDULES["piecewise"][name]
        for index, value in enumerate(values):
            if not argument.takes(value):
                yield _unfit(source, ("training", "scheduler", "args", name, index), f"list `{name}`", argument, value)
                return
    if any(later <= earlier for earlier, later in pairwise(boundaries)):
        yield Diagnostic(
            "`boundaries` must be whole numbers of steps, ascending",
            source.value_places(("training", "scheduler", "args", "boundaries")),
        )
