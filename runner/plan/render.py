"""A plan as text for people and as a record for programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runner.dataset.buckets import describe
from runner.plan.diff import Plan
from runner.plan.estimate import Figures
from runner.plan.fit import Fit, toml_lines

Paint = Callable[[str, str], str]
"""(text, colour) → text."""
_COLOURS = {"+": "green", "~": "yellow", "-/+": "red", "=": "bright_black"}
PLAN_VERSION = 1


def render_plan(plan: Plan, figures: Figures, paint: Paint = lambda text, _: text, width: int = 100) -> str:
    """The plan as shown in a terminal."""
    prepared = plan.prepared
    config = prepared.config
    kind = f"{config.network.type} of rank {config.network.rank}" if config.network else "full fine-tune"
    lines = [
        f"Run {paint(config.run.name, 'bold')}: {prepared.spec.title}, {prepared.model.label}, {kind}, seed {config.run.seed}",
        "",
    ]
    for action in plan.actions.values():
        lines.append(f"  {paint(f'{action.symbol:>3}', _COLOURS[action.symbol])} {action.node:<14} {action.summary}")
        lines += [f"{'':21}{paint('because ' + reason, 'bright_black')}" for reason in action.reasons]
    lines += ["", *_figure_lines(figures, plan)]
    lines += _derived(plan, paint)
    for warning in prepared.warnings:
        lines += ["", warning.render()]
    if len(prepared.dataset_notes):
        lines += ["", "  dataset", *(f"    {note}" for note in prepared.dataset_notes.render())]
    lines += [f"  note: {note}" for note in (*prepared.notes, *plan.notes)]
    if prepared.deferred:
        lines.append(f"  note: the digest of {len(prepared.deferred)} large model files is left to apply")
    pending = [action for action in plan.actions.values() if action.pending]
    lines += ["", _summary(plan, len(pending))]
    return "\n".join(lines)


def _summary(plan: Plan, pending: int) -> str:
    if not pending:
        return "Nothing to do: everything is up to date."
    text = f"{pending} of {len(plan.actions)} stages have something to do."
    if plan.throws_away:
        text += f"\n{another_training(plan.throws_away)} Apply asks first, or needs --yes."
    return text


def another_training(old: str) -> str:
    """What becomes of trained work that a run no longer shows."""
    return f"This trains anew: {old} give way in the run's folder, and stay in the store until `runner gc --delete`."


def _figure_lines(figures: Figures, plan: Plan) -> list[str]:
    items = f"{figures.items:,}"
    extra = []
    if figures.held_out:
        extra.append(f"{figures.held_out} held out")
    if figures.regularization:
        extra.append(f"{figures.regularization} of them for regularization")
    if figures.excluded:
        extra.append(f"{len(figures.excluded)} left out")
    config = plan.prepared.config
    accumulation = config.training.gradient_accumulation_steps
    per_epoch = f"{figures.steps_per_epoch:,} steps an epoch"
    if accumulation > 1:
        per_epoch += f" (x {accumulation} batches)"
    rows = [
        ("items", items + (f" ({', '.join(extra)})" if extra else "")),
        ("buckets", describe(figures.buckets[:8]) + (", …" if len(figures.buckets) > 8 else "")),
        ("batches", describe(figures.batches_per_epoch[:8]) + " an epoch"),
        ("steps", f"{figures.steps:,} in all, {per_epoch}, {figures.epochs:.2f} epochs"),
        ("checkpoints", f"{figures.checkpoints}, one each {figures.checkpoint_every:,} steps and at the end"),
        ("trained", _trained(figures)),
        ("memory", f"{size_text(figures.memory.peak)} predicted at the peak ({_phase(figures)}), and about 0.5 GB for the libraries"),
        ("disk", _disk(figures)),
        ("time", _time(figures, plan)),
    ]  # fmt: skip
    lines = [f"  {name:<12} {text}" for name, text in rows]
    lines += [f"  {'left out':<12} {name} {reason}" for name, reason in figures.excluded[:20]]
    if len(figures.excluded) > 20:
        lines.append(f"  {'':<12} … and {len(figures.excluded) - 20} more")
    return lines


def _trained(figures: Figures) -> str:
    layers = f" in {figures.trained_layers} layers" if figures.trained_layers else ""
    return f"{figures.trainable:,} parameters{layers}"


def _phase(figures: Figures) -> str:
    return max(figures.memory.phases, key=lambda name: figures.memory.phases[name], default="train")


def _disk(figures: Figures) -> str:
    total = sum(figures.disk.values())
    parts = ", ".join(f"{name} {size_text(size)}" for name, size in figures.disk.items() if size)
    return f"{size_text(total)} predicted" + (f" ({parts})" if parts else "")


def _time(figures: Figures, plan: Plan) -> str:
    if not plan.actions["train"].pending:
        return "no training to do"
    if figures.seconds is None:
        return "known once a step has been measured on this machine"
    return f"about {duration(figures.seconds)} of training, from steps measured on this machine"


def _derived(plan: Plan, paint: Paint) -> list[str]:
    lines = ["", "  derived"]
    for item in plan.prepared.derived:
        lines.append(f"    {item.key} = {item.value}  {paint('(' + item.why + ')', 'bright_black')}")
    return lines


def size_text(count: int) -> str:
    """`12.3 MB`, in powers of 1000."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return (
                f"{value:.0f} {unit}"
                if unit in ("B", "kB")
                else f"{value:.2f} {unit}"
                if value < 10
                else f"{value:.1f} {unit}"
            )
        value /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """`1 h 05 min`, `3 min 20 s`, `42 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole} s"


def render_fit(found: Fit) -> str:
    """A proposal of `--fit` as shown in a terminal: each change with the peak that it leads to, and the lines to write."""
    head = f"Predicted peak on a GPU, its libraries included: {size_text(found.before)} as it is."
    if found.after > found.limit:
        head += f" Nothing fits into {size_text(found.limit)}; this is the least that can be done:"
    elif not found.steps:
        return f"\n{head} It fits into {size_text(found.limit)}."
    else:
        head += f" The fastest settings that fit into {size_text(found.limit)}:"
    lines = ["", head]
    for remedy, peak in found.steps:
        named = ", ".join(f"{key} = {str(value).lower() if isinstance(value, bool) else value}" for key, value in remedy.settings.items())  # fmt: skip
        lines.append(f"  {size_text(peak):>8}  {named}")
        lines.append(
            f"{'':12}{remedy.why}" + (f"; a step takes about x {remedy.slower:.2f}" if remedy.slower > 1.005 else "")
        )
    lines += [f"  In all a step takes about x {found.slower:.2f} (phase at the peak: {found.phase}).", ""]
    return "\n".join([*lines, *(f"    {line}" for line in toml_lines(found.settings))])


def plan_record(plan: Plan, figures: Figures) -> dict[str, Any]:
    """The plan for `--json`, and what plan.json holds."""
    return {
        "version": PLAN_VERSION,
        "run": plan.prepared.config.run.name,
        "pending": plan.pending,
        "throws_away": plan.throws_away,
        "actions": [
            {**action.as_record(), "fingerprint": plan.graph.fingerprint(action.node)}
            for action in plan.actions.values()
        ],
        "figures": figures.as_record(),
        "derived": [{"key": item.key, "value": item.value, "why": item.why} for item in plan.prepared.derived],
        "warnings": [warning.as_record() for warning in plan.prepared.warnings],
        "notes": [*plan.prepared.notes, *plan.notes],
        "dataset_notes": plan.prepared.dataset_notes.as_records(),
    }
