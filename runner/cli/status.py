"""runner status."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from runner.cli import out
from runner.cli.common import json_option
from runner.errors import Exit
from runner.records import DamagedRecord, read_record
from runner.store.store import Store, find_store


@click.command()
@click.argument("place", type=click.Path(path_type=Path), default=Path("."))
@json_option
def command(place: Path, as_json: bool) -> int:
    """Show every run that uses the store of PLACE (a folder, or one run.toml)."""
    folder = place.parent if place.is_file() else place
    store = find_store(folder)
    registered, damaged = store.registry()
    for error in damaged:
        out.say(f"note: the record of a run is damaged: {error.file} ({error}); apply it again, or delete the record")
    rows = [status_of(store, record) for _, record in registered]
    if place.is_file():
        rows = [row for row in rows if Path(row["file"]) == place.absolute()]
    if as_json:
        out.record(rows)
    elif not rows:
        out.say(f"no runs yet in {store.root}")
    else:
        _table(rows)
    return Exit.DONE


def status_of(store: Store, record: dict[str, Any]) -> dict[str, Any]:
    """One run: state, stage, step, total, speed, seconds left, the chosen checkpoint."""
    from runner.core.events import read_events
    from runner.store.lock import is_held

    output = store.path_of(record["output_dir"])
    events = read_events(output / "logs" / "events.jsonl")
    running = is_held(store.run_lock(output))
    last = events[-1] if events else {}
    steps = [event for event in events if event.get("type") == "step"]
    step = steps[-1] if steps else {}
    state = "running" if running else "finished" if last.get("type") == "finished" else "stopped" if events else "new"
    if not running and last.get("type") == "ended" and last.get("reason") not in ("Stopped", "KeyboardInterrupt"):
        state = "failed"
    rate = step.get("steps_per_second")
    left = (step["total"] - step["step"]) / rate if running and rate and last.get("stage") == "train" else None
    return {
        "name": record["name"], "file": str(store.path_of(record["file"])), "output_dir": str(output), "state": state,
        "stage": last.get("stage"), "step": step.get("step"), "total": record.get("steps"), "loss": step.get("loss"),
        "steps_per_second": rate, "seconds_left": left, "chosen": _chosen(output),
        "reason": last.get("text") if state in ("failed", "stopped") else None,
    }  # fmt: skip


def _chosen(output: Path) -> str | None:
    try:
        record = read_record(output / "selection.json", {"chosen": {"step": int, "weights": str}})
    except DamagedRecord:
        return None
    if record is None:
        return None
    chosen = record["chosen"]
    return f"{chosen['step']}" + ("" if chosen["weights"] == "raw" else f" {chosen['weights']}")


def _table(rows: list[dict[str, Any]]) -> None:
    from runner.plan.render import duration

    lines = [("run", "state", "stage", "step", "speed", "left", "chosen")]
    for row in rows:
        speed = f"{row['steps_per_second']:.2f}/s" if row["steps_per_second"] else ""
        left = duration(row["seconds_left"]) if row["seconds_left"] is not None else ""
        step = f"{row['step'] or 0}/{row['total']}"
        lines.append((row["name"], row["state"], row["stage"] or "", step, speed, left, row["chosen"] or ""))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for number, line in enumerate(lines):
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        out.data(out.paint(text, "bold") if number == 0 else text)
    for row in rows:
        if row["reason"]:
            out.data(f"{row['name']}: {row['reason']}")
