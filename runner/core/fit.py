"""The one training loop. It knows steps, precision, state and signals; models and data are the task's, files the hooks'."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor

from runner.core.state import State, flatten_optimizer, restore_optimizer
from runner.core.task import Task
from runner.errors import RunFailed
from runner.optim.averaging import begin_training, evaluated
from runner.optim.rates import effective_rates
from runner.optim.single import SingleOptimizers
from runner.rng import seed_modules


@dataclass(frozen=True, kw_only=True)
class Loop:
    """How the loop runs. `factor` gives the schedule's factor for each step (from 0)."""

    steps: int
    seed: int
    max_grad_norm: float
    clip_grad: str
    log_every: int
    factor: Callable[[int], float]
    ema: EMAModel | None = None
    ema_every: int = 1


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What happens around the steps. Each is told the number of finished steps."""

    is_due: Callable[[int], bool]
    """Whether `after` has something to do at this step; the loop then makes sure that all losses were finite."""
    after: Callable[[int, Callable[[], State]], None]
    log: Callable[[int, dict[str, float]], None]
    stop_requested: Callable[[], bool] = lambda: False
    last_checkpoint: Callable[[], str] = lambda: "none"
    resumed: Callable[[int], None] = lambda step: None
    """Told once, where the loop goes on from a state."""


class Stop(Exception):
    """The loop was asked to stop; `state` is where to go on."""

    def __init__(self, state: State) -> None:
        super().__init__(f"stopped after step {state.step}")
        self.state = state


@dataclass(kw_only=True)
class _Meters:
    """Sums on the device, read only when a line is logged: reading waits for the device."""

    loss: Tensor
    first_bad: Tensor
    count: int = 0
    norm: Tensor | None = None
    history: list[dict[str, float]] = field(default_factory=list)


def fit(
    task: Task,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loop: Loop,
    hooks: Hooks,
    start: State | None,
) -> State:
    """Trains to `loop.steps` and returns the final state. Raises `Stop`, or `RunFailed` for a loss that is not finite."""
    accelerator = Accelerator(cpu=task.device.type == "cpu")
    parameters = list(task.parameters.values())
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    meters = _Meters(
        loss=torch.zeros((), device=task.device), first_bad=torch.full((), loop.steps + 1, device=task.device)
    )
    step = _restore(task, optimizer, scaler, loop, start, meters) if start is not None else 0

    trained: list[Tensor] | None = None  # the weights that train, while others stand in their places
    begin_training(optimizer)

    def state() -> State:
        return _capture(task, optimizer, scaler, loop, meters, step, trained)

    if start is not None:
        with evaluated(optimizer, parameters):
            hooks.resumed(step)
    task.train_mode(True)
    began, began_step = time.perf_counter(), step
    recent: dict[int, list[tuple[str, ...]]] = {}
    for batches in task.steps_from(step):
        if step >= loop.steps:
            break
        if isinstance(optimizer, SingleOptimizers):
            optimizer.rounding = (loop.seed, step)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * loop.factor(step)
        total = torch.zeros((), device=task.device)
        for index, batch in enumerate(batches):
            seed_modules(loop.seed, "modules", step, index)
            loss = task.loss(batch)
            accelerator.backward(scaler.scale(loss * batch.share))
            total += loss.detach() * batch.share
        if loop.max_grad_norm > 0:
            scaler.unscale_(optimizer)
            meters.norm = _clip(parameters, loop)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        task.stepped()
        if loop.ema is not None and (step + 1) % loop.ema_every == 0:
            loop.ema.step(parameters)
        step += 1
        meters.loss += total
        meters.count += 1
        meters.first_bad = torch.where(torch.isfinite(total), meters.first_bad, meters.first_bad.clamp(max=step))
        recent[step] = [batch.names for batch in batches]
        due, last, stopping = hooks.is_due(step), step == loop.steps, hooks.stop_requested()
        if due or last or stopping or step % loop.log_every == 0:
            _check_finite(meters, recent, loop, hooks)
            recent.clear()
        if step % loop.log_every == 0 or last:
            _log(meters, step, optimizer, hooks, (step - began_step) / max(time.perf_counter() - began, 1e-9))
        if due:
            task.train_mode(False)
            with evaluated(optimizer, parameters) as backup:
                trained = backup
                hooks.after(step, state)
            trained = None
            task.train_mode(True)
        if stopping and not last:
            raise Stop(state())
    task.train_mode(False)
    return state()


def _clip(parameters: list[torch.nn.Parameter], loop: Loop) -> Tensor:
    """Scales gradients down and returns the norm of all of them before."""
    if loop.clip_grad == "global":
        return torch.nn.utils.clip_grad_norm_(parameters, loop.max_grad_norm)
    norms = [torch.nn.utils.clip_grad_norm_([own], loop.max_grad_norm).to(own.device) for own in parameters]
    return torch.stack(norms).norm()


def _check_finite(meters: _Meters, recent: dict[int, list[tuple[str, ...]]], loop: Loop, hooks: Hooks) -> None:
    bad = int(meters.first_bad.item())
    if bad > loop.steps:
        return
    names = sorted({name for own in recent.get(bad, []) for name in own})
    raise RunFailed(
        f"the loss is not finite at step {bad}; items of its batch: {', '.join(names[:12]) or 'unknown'}; "
        f"last good checkpoint: {hooks.last_checkpoint()}",
        hint="lower training.learning_rate, check those items, or use bf16 instead of fp16",
    )


def _log(meters: _Meters, step: int, optimizer: torch.optim.Optimizer, hooks: Hooks, steps_per_second: float) -> None:
    line = {"loss": meters.loss.item() / max(meters.count, 1)}
    line |= effective_rates(optimizer)
    if meters.norm is not None:
        line["grad_norm"] = meters.norm.item()
    meters.history.append({"step": step, **line})
    meters.loss.zero_()
    meters.count = 0
    hooks.log(step, {**line, "steps_per_second": steps_per_second})


def _capture(
    task: Task,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loop: Loop,
    meters: _Meters,
    step: int,
    trained: list[Tensor] | None,
) -> State:
    tensors, rest = flatten_optimizer(optimizer.state_dict())
    weights = trained if trained is not None else [parameter.detach() for parameter in task.parameters.values()]
    groups = {"weights": dict(zip(task.parameters, weights, strict=True)), "optimizer": tensors}
    counters: dict[str, Any] = {
        "optimizer": rest,
        "scaler": scaler.state_dict(),
        "history": meters.history,
        "loss_sum": meters.loss.item(),
        "loss_count": meters.count,
    }
    if loop.ema is not None:
        groups["ema"] = dict(zip(task.parameters, loop.ema.shadow_params, strict=True))
        counters["ema_steps"] = loop.ema.optimization_step
    return State(step, groups, counters)


def _restore(
    task: Task,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loop: Loop,
    start: State,
    meters: _Meters,
) -> int:
    with torch.no_grad():
        for name, parameter in task.parameters.items():
            parameter.copy_(start.groups["weights"][name])
    restore_optimizer(optimizer, start.groups["optimizer"], start.counters["optimizer"])
    scaler.load_state_dict(start.counters["scaler"])
    if loop.ema is not None:
        for name, shadow in zip(task.parameters, loop.ema.shadow_params, strict=True):
            shadow.copy_(start.groups["ema"][name])
        loop.ema.optimization_step = start.counters["ema_steps"]
    meters.loss += start.counters["loss_sum"]
    meters.count = start.counters["loss_count"]
    meters.history = list(start.counters["history"])
    return start.step
