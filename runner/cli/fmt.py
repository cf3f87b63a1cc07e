"""runner fmt."""

from __future__ import annotations

from pathlib import Path

import click

from runner.cli import out
from runner.cli.common import run_file
from runner.errors import Exit, UsageError


@click.command()
@run_file
@click.option("--minimal", is_flag=True, help="Take out keys that say what the defaults say.")
@click.option("--full", is_flag=True, help="Write every key, with its default or derived value.")
@click.option("--check", is_flag=True, help="Change nothing; exit with 1 where the file would change.")
def command(file: Path, minimal: bool, full: bool, check: bool) -> int:
    """Tidy FILE in place; its comments are kept."""
    from runner.atomic import write_text
    from runner.config.format import full_text, minimal_text, tidy_text
    from runner.config.load import load

    if minimal and full:
        raise UsageError("--minimal and --full exclude each other")
    loaded = load(file)
    config = loaded.require()
    text = loaded.source.text
    if minimal:
        text = minimal_text(text)
    elif full:
        from runner.cli.common import prepared_run

        text = full_text(text, prepared_run(file, loaded=loaded).config, config)
    text = tidy_text(text)
    if text == loaded.source.text:
        out.say(f"{file} is tidy")
        return Exit.DONE
    if check:
        out.say(f"{file} would change")
        return Exit.FAILED
    write_text(file, text)
    out.say(f"{file} is written")
    return Exit.DONE
