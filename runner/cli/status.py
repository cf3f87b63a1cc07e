"""runner status."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runner.cli import out
from runner.cli.common import json_option
from runner.errors import Exit
from runner.files import MOST_TEXT_BYTES, read_bytes
from runner.records import DamagedRecord, read_record
from runner.store.store import FOLDER, Store, find_store

if TYPE_CHECKING:
    from runner.plan.history import Applied


@click.command()
@click.argument("place", type=click.Path(path_type=Path), default=Path("."))
@json_option
def command(place: Path, as_json: bool) -> int:
    """Show every run that uses the store of PLACE: a folder, or one run.toml.

    Where a folder has no store, those of the folders in it are shown.
    """
    rows = []
    stores = _stores(place.parent if place.is_file() else place)
    for store in stores:
        registered, damaged = store.registry()
        for error in damaged:
            out.say(
                f"note: the record of a run is damaged: {error.file} ({error}); apply it again, or delete the record"
            )
        wanted = store.portable(place) if place.is_file() else None
        for _, record in registered:
            if wanted not in (None, record["file"]):
                continue
            try:
                rows.append(status_of(store, record))
            except OSError as error:  # the other runs can be looked at
                out.say(f"note: run {record['name']!r} cannot be looked at: {error.filename}: {error.strerror}")
    if as_json:
        out.record(rows)
    elif not rows:
        out.say(f"no runs yet in {stores[0].root}")
    else:
        _table(rows)
    return Exit.DONE


def _stores(folder: Path) -> list[Store]:
    """The store of a folder; where there is none yet, those that lie up to two folders below it."""
    own = find_store(folder)
    if own.root.is_dir():
        return [own]
    below = [root for pattern in (f"*/{FOLDER}", f"*/*/{FOLDER}") for root in sorted(folder.absolute().glob(pattern))]
    return [Store(root) for root in below if root.is_dir()] or [own]


def status_of(store: Store, record: dict[str, Any]) -> dict[str, Any]:
    """One run: state, stage, step, total, losses, speed, seconds taken and left, the chosen checkpoint, what it was applied with."""
    from runner.core.events import read_events
    from runner.plan.history import Applied
    from runner.store.lock import is_held

    output, file = store.path_of(record["output_dir"]), store.path_of(record["file"])
    events = read_events(output / "logs" / "events.jsonl")
    running = is_held(store.run_lock(output))
    last = events[-1] if events else {}
    steps = [event for event in events if event.get("type") == "step"]
    step = steps[-1] if steps else {}
    state = "running" if running else "finished" if last.get("type") == "finished" else "stopped" if events else "new"
    if not running and last.get("type") == "ended" and last.get("reason") not in ("Stopped", "KeyboardInterrupt"):
        state = "failed"
    rate = step.get("steps_per_second")
    left = (
        (step["total"] - step["step"]) / rate if running and rate and last.get("stage") == step.get("stage") else None
    )
    applied = Applied(record, store.run_record(output))
    # Until an apply is done the folder shows what was chosen of the one before it.
    chosen, loss = _chosen(output) if record.get("complete", True) else (None, None)
    return {
        "name": record["name"],
        "file": str(file),
        "output_dir": str(output),
        "state": state,
        "stage": last.get("stage"),
        "step": step.get("step"),
        "total": record.get("steps"),
        "loss": step.get("loss"),
        "steps_per_second": rate,
        "seconds": _seconds(events, step.get("stage")),
        "seconds_left": left,
        "last_event": last.get("time"),
        "chosen": chosen,
        "chosen_loss": loss,
        "settings": list(applied.settings),
        "file_changed": _changed(applied, file),
        "reason": last.get("text") if state in ("failed", "stopped") else None,
    }


def _changed(applied: Applied, file: Path) -> bool | None:
    """Whether run.toml was edited since the last apply; None where it is gone."""
    try:
        return applied.file_changed(read_bytes(file, MOST_TEXT_BYTES).decode("utf-8-sig", "replace"))
    except OSError:
        return None


def _seconds(events: list[dict[str, Any]], stage: str | None) -> float | None:
    """How long the applies took that led to the present steps of a stage: back to the one that began it."""
    attempts: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        attempts.setdefault(event.get("attempt", 0), []).append(event)
    total = 0.0
    for attempt in sorted(attempts, reverse=True):
        own = attempts[attempt]
        total += own[-1].get("time", 0.0) - own[0].get("time", 0.0)
        kinds = {event.get("type") for event in own if event.get("stage") == stage}
        if "started" in kinds and "resumed" not in kinds:
            break
    return round(total, 1) if attempts else None


def _chosen(output: Path) -> tuple[str | None, float | None]:
    """The chosen checkpoint and its stable loss."""
    try:
        record = read_record(output / "selection.json", {"chosen": {"step": int, "weights": str}})
    except DamagedRecord:
        return None, None
    if record is None:
        return None, None
    chosen = record["chosen"]
    which = (chosen["step"], chosen["weights"])
    rows = record.get("candidates")
    found = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    loss = next((row.get("stable_loss") for row in found if (row.get("step"), row.get("weights")) == which), None)
    return f"{which[0]}" + ("" if which[1] == "raw" else f" {which[1]}"), loss if isinstance(loss, float) else None


def _table(rows: list[dict[str, Any]]) -> None:
    """Columns that say nothing of any run are left out."""
    lines: list[tuple[str, ...]] = [
        ("run", "state", "stage", "step", "loss", "chosen", "its loss", "speed", "left", "took", "last", "folder")
    ]
    lines += [_cells(row) for row in rows]
    columns = [column for column in range(len(lines[0])) if any(line[column] for line in lines[1:])]
    widths = {column: max(len(line[column]) for line in lines) for column in columns}
    for number, line in enumerate(lines):
        text = "  ".join(line[column].ljust(widths[column]) for column in columns).rstrip()
        out.data(out.paint(text, "bold") if number == 0 else text)
    for row in rows:
        folder = _shown_folder(row)
        if row["reason"]:
            out.data(f"{folder}: {row['reason']}")
        if row["settings"]:
            out.data(f"{folder}: applied with {_settings(row)}")
        if row["file_changed"]:
            out.data(f"{folder}: {Path(row['file']).name} was edited since it was applied")
        if row["file_changed"] is None:
            out.data(f"{folder}: {row['file']} is gone")


def _settings(row: dict[str, Any]) -> str:
    from runner.plan.history import settings_text

    return settings_text(row["settings"])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    from runner.plan.render import duration

    speed = f"{row['steps_per_second']:.2f}/s" if row["steps_per_second"] and row["state"] == "running" else ""
    took, left = (duration(row[key]) if row[key] is not None else "" for key in ("seconds", "seconds_left"))
    loss, chosen_loss = (f"{row[key]:.4f}" if row[key] is not None else "" for key in ("loss", "chosen_loss"))
    last = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["last_event"])) if row["last_event"] is not None else ""
    return (
        row["name"],
        row["state"],
        row["stage"] or "",
        f"{row['step'] or 0}/{row['total']}",
        loss,
        row["chosen"] or "",
        chosen_loss,
        speed,
        left,
        took,
        last,
        _shown_folder(row),
    )


def _shown_folder(row: dict[str, Any]) -> str:
    """Relative to where the command is called, where it lies below that."""
    output = Path(row["output_dir"])
    return str(output.relative_to(Path.cwd())) if output.is_relative_to(Path.cwd()) else str(output)
