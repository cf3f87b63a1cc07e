"""What a step asks of a GPU, counted without one: each family at full size, with tensors that hold no numbers.

    python -m benchmarks.roofline [--family NAME …] [--seconds N] [--kinds] [--callers N] [--json FILE] [--record]

Operations, FLOP and bytes are exact: the real step is run (core/fit.py, stages/task.py) on what pretends to be CUDA
(benchmarks/pretended.py). Times are predictions: of the device the sum over operations of the largest of FLOP / 75 % of
its peak, bytes / 85 % of its bandwidth and 2.5 us; of the host 8 us an operation. `--record` writes the counts that
tests/test_roofline.py holds. With `--seconds` no row is begun after so many.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click

from benchmarks.counted import CARDS, HEAVY, KINDS, Count, Meter, keeping
from benchmarks.full_size import SETTINGS, FullSize, Setting
from benchmarks.measure import GB, ROOT
from benchmarks.pretended import NotPossible, pretended

RECORD = ROOT / "tests" / "data" / "roofline.json"
LIBRARIES = ("torch", "diffusers", "peft", "bitsandbytes")


@dataclass(kw_only=True)
class Row:
    """A setting's counts."""

    setting: Setting
    step: Count
    sample: Count | None = None
    score: Count | None = None
    seconds: float = 0.0


class _Enough(Exception):
    """What was to be counted is counted."""


def count(setting: Setting, everything: bool = True, callers: bool = False) -> Row:
    """Raises `NotPossible`."""
    import torch

    began = time.monotonic()
    meter = Meter(callers)
    with tempfile.TemporaryDirectory(prefix="runner-roofline-") as folder, pretended(lambda *given: meter(*given)):
        run = FullSize.load(setting, Path(folder))
        step_of(run, meter)
        row = Row(setting=setting, step=meter.count)
        if everything:
            with torch.no_grad():
                meter = Meter(callers)
                sample_of(run, meter)
                row.sample = meter.count
                meter = Meter(callers)
                score_of(run, meter)
                row.score = meter.count
    row.seconds = time.monotonic() - began
    return row


def step_of(run: FullSize, meter: Meter) -> None:
    """Counts a step of the real loop that is not its first: from its batch to where the next one is asked for."""
    import torch

    from runner.core.fit import Hooks, Loop, fit
    from runner.core.precision import scaler

    task, optimizer = run.task(), run.optimizer()
    for parameter in task.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes its states
    optimizer.zero_grad(set_to_none=True)
    modules = run.trained.modules.values()
    weights = [x for module in modules for x in (*module.parameters(), *module.buffers())]
    steps, loss = task.steps_from, task.loss

    def counted_steps(first: int) -> Iterator[Any]:
        meter.on, meter.phase = True, "forward"
        yield next(steps(first))
        raise _Enough

    def counted_loss(batch: Any) -> Any:
        with keeping(meter, weights):
            found = loss(batch)
        meter.phase = "backward"
        return found

    inputs = run.inputs
    scaling = scaler(inputs.numerics.mixed_precision, task.device)
    scaling.unscale_ = lambda _: setattr(meter, "phase", "optimizer")  # what comes after the backward pass
    task.steps_from, task.loss = counted_steps, counted_loss
    loop = Loop(
        steps=10**6,
        seed=inputs.seed,
        max_grad_norm=inputs.max_grad_norm,
        clip_grad=inputs.clip_grad,
        log_every=10**6,
        factor=lambda step: 1.0,
    )
    hooks = Hooks(is_due=lambda step: False, after=lambda *_: None, log=lambda *_: None)
    try:
        fit(task, optimizer, scaling, loop, hooks, None)
    except _Enough:
        meter.on = False
    optimizer.zero_grad(set_to_none=True)
    task.train_mode(False)


def sample_of(run: FullSize, meter: Meter) -> None:
    """Counts the second step of a sampler: from one call of the denoiser to the next."""
    import torch

    from runner.stages.pictures import make_latents

    denoise = run.context.family.denoise
    calls = 0

    def counted(denoiser: Any, x_t: Any, t: Any, conditioning: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            return torch.zeros_like(x_t, dtype=torch.float32)
        if calls > 2:
            raise _Enough
        meter.on = True
        return denoise(denoiser, x_t, t, conditioning)

    context = replace(run.context, family=replace(run.context.family, denoise=counted))
    prompt = replace(run.graph.prepared.prompts[0], seed=1)
    try:
        make_latents(context, run.trained.modules, prompt, run.encoded(prompt))
    except _Enough:
        meter.on = False


def score_of(run: FullSize, meter: Meter) -> None:
    """Counts the measurement of one item; of a video at one of its levels, which are measured one after the other."""
    from runner.stages.score import LEVELS

    levels = 1 if run.graph.runtime.model.makes_video else LEVELS
    with patch("runner.stages.score.LEVELS", levels):
        meter.on = True
        run.scorer()._measure(run.inputs.items[:1], run.trained.modules, None)
        meter.on = False


# --- what is shown ----------------------------------------------------------------------------------------------------


def libraries() -> dict[str, str]:
    """The versions that the counts depend on, without the builds they are of."""
    return {name: version(name).split("+")[0] for name in LIBRARIES}


def shown(row: Row) -> Iterator[dict[str, Any]]:
    """A line of the table for each thing that was counted."""
    for name, found in (("training step", row.step), ("sample step", row.sample), ("score", row.score)):
        if found is not None:
            rest = sum(size for kind, size in found.moved.items() if kind not in HEAVY)
            yield {
                "setting": row.setting.title,
                "what": name,
                "operations": found.total,
                "launches": found.launches,
                "TFLOP": found.flop / 1e12,
                "GB moved": found.moved.total() / GB,
                "of it other than GEMM, convolution, attention": rest / GB,
                "GB kept": found.kept / GB,
                "waits": found.waits,
                **{f"{card}, ms": 1e3 * found.seconds[card] for card in CARDS},
                "host, ms": 1e3 * found.host,
            }


def kinds(row: Row) -> Iterator[dict[str, Any]]:
    """A line for each kind of operation of a training step."""
    for kind in KINDS:
        yield {
            "setting": row.setting.title,
            "kind": kind,
            "operations": row.step.operations[kind],
            "GB moved": row.step.moved[kind] / GB,
            **{f"{card}, ms": 1e3 * row.step.times[card][kind] for card in CARDS},
        }


def said(line: dict[str, Any]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(_word(value) for value in line.values()) + " |"


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def differences(held: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What is counted otherwise than before, by kind of operation."""
    lines = []
    for name, old in held.items():
        new = found[name]
        if isinstance(old, dict):
            for kind in sorted({*old, *new}):
                if old.get(kind, 0) != new.get(kind, 0):
                    lines.append(f"{name}, {kind}: {old.get(kind, 0):,} before, {new.get(kind, 0):,} now")
        elif old != new:
            lines.append(f"{name}: {old:,} before, {new:,} now")
    return lines


def record(row: Row) -> None:
    """Puts a row's counts beside those that are held; all go where they are of other libraries."""
    held = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    if held.get("libraries") != libraries():
        held = {"libraries": libraries(), "steps": {}}
    held["steps"][row.setting.title] = row.step.exact()
    RECORD.write_text(json.dumps(held, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


@click.command(help=__doc__)
@click.option("--family", "families", multiple=True, type=click.Choice(sorted({each.family for each in SETTINGS})))
@click.option("--seconds", type=float, default=float("inf"), help="Begin no row after so many.")
@click.option("--only-step", is_flag=True, help="No sample steps, no scores.")
@click.option("--kinds", "by_kind", is_flag=True, help="The training step by kind of operation.")
@click.option("--callers", type=int, default=0, help="The most frequent pairs of operation and caller.")
@click.option("--json", "out", type=click.Path(path_type=Path))
@click.option("--record", "recording", is_flag=True, help="Write the counts that the test holds.")
def main(
    families: tuple[str, ...],
    seconds: float,
    only_step: bool,
    by_kind: bool,
    callers: int,
    out: Path | None,
    recording: bool,
) -> None:
    began, lines = time.monotonic(), []
    for setting in SETTINGS:
        if (families and setting.family not in families) or time.monotonic() - began > seconds:
            continue
        try:
            row = count(setting, not only_step, callers > 0)
        except NotPossible as error:
            raise click.ClickException(str(error)) from None
        new = list(shown(row))
        if not lines:
            click.echo(said(dict(zip(new[0], new[0], strict=True))) + "\n|" + "---|" * len(new[0]))
        for line in [*new, *(kinds(row) if by_kind else ())]:
            click.echo(said(line))
        for (name, place), calls in row.step.callers.most_common(callers):
            click.echo(f"{calls:6,} {name} from {place}")
        click.echo(f"counted in {row.seconds:.0f} s", err=True)
        lines += [*new, *kinds(row)]
        if recording:
            record(row)
        if out is not None:
            out.write_text(json.dumps({"libraries": libraries(), "rows": lines}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
