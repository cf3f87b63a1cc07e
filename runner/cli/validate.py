"""runner validate."""

from __future__ import annotations

from pathlib import Path

import click

from runner.cli import out
from runner.cli.common import json_option, prepared_run, run_file, settings_option
from runner.errors import Exit, InvalidConfig


@click.command()
@run_file
@settings_option
@json_option
def command(file: Path, settings: tuple[str, ...], as_json: bool) -> int:
    """Check the whole of FILE, the files it names and the dataset; show all errors at once."""
    try:
        prepared = prepared_run(file, settings)
    except InvalidConfig as error:
        if not as_json:
            raise
        out.record({"valid": False, "diagnostics": [finding.as_record() for finding in error.diagnostics]})
        return Exit.INVALID
    if as_json:
        out.record(
            {
                "valid": True,
                "diagnostics": [finding.as_record() for finding in prepared.warnings],
                "notes": prepared.notes,
                "dataset_notes": prepared.dataset_notes.as_records(),
            }
        )
        return Exit.DONE
    out.diagnostics(prepared.warnings)
    for note in (*prepared.dataset_notes.render(), *prepared.notes):
        out.say(f"note: {note}")
    items = len(prepared.collection.items)
    out.data(f"{file} is valid: {items:,} items, {prepared.length.steps:,} steps")
    return Exit.DONE
