"""A plan as text for people and as a record for programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runner.dataset.buckets import describe
from runner.inputs.train import TrainInputs
from runner.plan.diff import Plan
from runner.plan.estimate import LIBRARIES, Figures
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
        files = counted(len(prepared.deferred), "large model file")
        lines.append(f"  note: the digest of {files} is left to apply")
    pending = [action for action in plan.actions.values() if action.pending]
    lines += ["", _summary(plan, len(pending))]
    return "\n".join(lines)


def _summary(plan: Plan, pending: int) -> str:
    if not pending:
        return "Nothing to do: everything is up to date."
    text = f"{pending} of {len(plan.actions)} stages {'has' if pending == 1 else 'have'} something to do."
    if plan.throws_away:
        text += f"\n{another_training(plan.throws_away)} Apply asks first, or needs --yes."
    return text


def another_training(old: str) -> str:
    """What becomes of trained work that a run no longer shows."""
    return f"This trains anew: {old} give way in the run's folder, and stay in the store until `runner gc --delete`."


def _figure_lines(figures: Figures, plan: Plan) -> list[str]:
    items = f"{figures.items:,}"
    if figures.regularization:
        items += f" ({figures.regularization:,} of them for regularization)"
    for count, words in ((figures.held_out, "held out beside them"), (len(figures.excluded), "left out")):
        items += f", {count:,} {words}" if count else ""
    rows = [
        ("items", items),
        ("buckets", describe(figures.buckets[:8]) + (", …" if len(figures.buckets) > 8 else "")),
        ("batches", describe(figures.batches_per_epoch[:8]) + " an epoch"),
        ("steps", _steps(figures, plan)),
        ("checkpoints", _checkpoints(figures, plan)),
        ("trained", _trained(figures)),
        *([("denoisers", _denoisers(figures))] if figures.denoisers else []),
        ("memory", _memory(figures)),
        ("disk", _disk(figures)),
        ("time", _time(figures, plan)),
    ]
    lines = [f"  {name:<12} {text}" for name, text in rows]
    lines += [f"  {'left out':<12} {name} {reason}" for name, reason in figures.excluded[:20]]
    if len(figures.excluded) > 20:
        lines.append(f"  {'':<12} … and {len(figures.excluded) - 20} more")
    return lines


def _trained(figures: Figures) -> str:
    layers = f" in {figures.trained_layers} layers" if figures.trained_layers else ""
    return f"{figures.trainable:,} parameters{layers}"


def _denoisers(figures: Figures) -> str:
    """`denoiser_2 for timesteps below 875, denoiser from 875 on`."""
    (first, _, end), *others = figures.denoisers
    parts = [f"{name} from {low:g}" + (f" to below {high:g}" if high else " on") for name, low, high in others]
    return ", ".join([f"{first} for timesteps below {end:g}", *parts])


def _steps(figures: Figures, plan: Plan) -> str:
    """`24 in all, 3 steps an epoch of 8 batches each, the last of 2; 8.00 epochs`."""
    accumulation = plan.prepared.config.training.gradient_accumulation_steps
    batches = sum(count for _, _, count in figures.batches_per_epoch)
    each = ""
    if accumulation > batches:
        each = f" of {counted(batches, 'batch', 'batches')} (an epoch has no more, and its rest is not carried on: gradient_accumulation_steps = {accumulation} is never reached)"
    elif accumulation > 1:
        rest = batches % accumulation
        each = f" of {accumulation} batches" + (f", the last of {rest}" if rest else "")
    return f"{figures.steps:,} in all, {counted(figures.steps_per_epoch, 'step')} an epoch{each}; {figures.epochs:.2f} epochs"


def _checkpoints(figures: Figures, plan: Plan) -> str:
    every, keep = figures.checkpoint_every, plan.graph.runtime.keep
    if every >= figures.steps:
        return "1, at the end"
    text = f"{figures.checkpoints:,}, one each {'step' if every == 1 else f'{every:,} steps'}"
    if figures.steps % every:
        text += " and at the end"
    if keep is not None and keep < figures.checkpoints:
        text += f"; kept are the newest {'one' if keep == 1 else keep} and the best of those before"
    return text


def _memory(figures: Figures) -> str:
    return f"{size_text(figures.peak)} predicted at the peak ({figures.memory.highest}) {memory_words(figures.device)}"


def memory_words(device: str) -> str:
    """`on a GPU, 0.9 GB for its libraries included`: what a memory figure of the plan, of --fit and of new is of."""
    place = "a GPU" if device == "cuda" else "the CPU"
    return f"on {place}, {LIBRARIES[device] / 1e9:.1f} GB for the libraries included"


def _disk(figures: Figures) -> str:
    total = sum(figures.disk.values())
    parts = ", ".join(f"{name} {size_text(size)}" for name, size in figures.disk.items() if size)
    return f"{size_text(total)} predicted" + (f" ({parts})" if parts else "")


def _time(figures: Figures, plan: Plan) -> str:
    if not plan.action(TrainInputs).pending:
        return "no training to do"
    if figures.seconds is None:
        return "known once a step has been measured on this machine"
    return f"about {duration(figures.seconds)} of training, from steps measured on this machine"


def _derived(plan: Plan, paint: Paint) -> list[str]:
    lines = ["", "  derived"]
    for item in plan.prepared.derived:
        lines.append(f"    {item.key} = {item.value}  {paint('(' + item.why + ')', 'bright_black')}")
    return lines


def counted(count: int, noun: str, nouns: str | None = None) -> str:
    """`1 step`, `1,200 steps`."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


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
    limit = size_text(found.limit)
    head = f"Predicted peak {memory_words('cuda')}: {size_text(found.before)} as it is."
    if found.fits and not found.steps:
        return f"\n{head} It fits into {limit}."
    if found.fits:
        head += f" The fastest settings that fit into {limit}:"
    else:
        head += f" Nothing fits into {limit}."
        head += (
            " This is the least that can be done:" if found.steps else " There is no setting left that saves memory."
        )
    lines = ["", head]
    for remedy, peak in found.steps:
        named = ", ".join(
            f"{key} = {str(value).lower() if isinstance(value, bool) else value}"
            for key, value in remedy.settings.items()
        )
        lines.append(f"  {size_text(peak):>8}  {named}")
        lines.append(
            f"{'':12}{remedy.why}" + (f"; a step takes about x {remedy.slower:.2f}" if remedy.slower > 1.005 else "")
        )
    if found.steps:
        lines.append(f"  In all a step takes about x {found.slower:.2f} (phase at the peak: {found.phase}).")
    if not found.fits:
        lines.append(f"  What is left is to train less at a time: {_SMALLER}.")
    if found.steps:
        lines += ["", "  In run.toml:", "", *(f"    {line}" for line in toml_lines(found.settings))]
    return "\n".join(lines)


_SMALLER = "a smaller dataset.resolution, shorter clips, a smaller network.rank, smaller samples"


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
