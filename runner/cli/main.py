"""The program's edge: finds the verb, runs it, and turns what it raises into an exit code."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from importlib import import_module

import click

from runner import __version__
from runner.errors import Exit, RunFailed, Stopped, UserError

VERBS: dict[str, tuple[str, str]] = {
    "recipes": ("runner.cli.recipes", "List the recipes that come with runner."),
    "copy": ("runner.cli.recipes:copy", "Copy a recipe to a folder of your own."),
    "new": ("runner.cli.new", "Write a run.toml for a model and a folder of pictures."),
    "validate": ("runner.cli.validate", "Check run.toml, its files and its dataset; show all errors at once."),
    "plan": ("runner.cli.plan", "Show what apply would do, and why."),
    "apply": ("runner.cli.apply", "Do it: cache, train, sample, select, publish."),
    "status": ("runner.cli.status", "Show every run: state, step, speed, chosen checkpoint."),
    "sample": ("runner.cli.sample", "Make pictures with a run's checkpoint."),
    "select": ("runner.cli.select", "Choose a checkpoint by hand, or let the rule choose again."),
    "export": ("runner.cli.export", "Write a checkpoint in another program's format."),
    "report": ("runner.cli.report", "Make strip.png and report.html again."),
    "diff": ("runner.cli.diff", "Compare two runs' configurations."),
    "explain": ("runner.cli.explain", "Explain a key of run.toml."),
    "fmt": ("runner.cli.fmt", "Tidy run.toml; or only what differs from the defaults; or everything."),
    "schema": ("runner.cli.schema", "Write the JSON Schema of run.toml for editors."),
    "gc": ("runner.cli.gc", "Show (or delete) what no run needs any more."),
    "doctor": ("runner.cli.doctor", "Check this machine and installation."),
}


class Verbs(click.Group):
    """Imports a verb's module only when it is used, so that --help is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, _, attribute = VERBS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), attribute or "command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in VERBS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], VERBS, 1)
            ctx.fail(f"there is no command {args[0]!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return super().resolve_command(ctx, args)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="runner")
def cli() -> None:
    """One run.toml, one plan, one command: fine-tuning of diffusion models.

    Start with: runner copy quickstart my-run; runner plan my-run/run.toml; runner apply my-run/run.toml
    """


def main() -> None:
    """The entry point; never returns."""
    sys.exit(run())


def run() -> int:
    """Runs the command line and returns its exit code."""
    notes, logger = _Notes(), logging.getLogger("runner")
    logger.addHandler(notes)
    logger.propagate = False  # a library may have given the root a handler
    try:
        return _run()
    finally:
        logger.removeHandler(notes)
        logger.propagate = True


def _run() -> int:
    try:
        result = cli.main(standalone_mode=False)
        return int(result) if isinstance(result, int) else Exit.DONE
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.UsageError as error:
        error.show()
        return Exit.USAGE
    except click.ClickException as error:
        error.show()
        return Exit.USAGE
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return Exit.INTERRUPTED
    except Stopped as error:
        click.echo(str(error), err=True)
        return error.code
    except UserError as error:
        from runner.cli.out import diagnostics

        diagnostics(list(error.diagnostics))
        return error.code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.DONE
    except Exception as error:  # noqa: BLE001 - the one place where everything else ends
        return _ended(error)


def _ended(error: Exception) -> int:
    """A call that the system refused has its cause named; everything else is a bug."""
    from runner.cli.edge import refused, report_bug

    failure = refused(error) if isinstance(error, OSError) else None
    if isinstance(error, MemoryError):
        failure = RunFailed("there is not enough memory", hint="end other programs, or give this one less to do")
    if failure is None:
        return report_bug(error)
    from runner.cli.out import diagnostics

    with suppress(OSError):
        diagnostics(list(failure.diagnostics))
    return failure.code


class _Notes(logging.Handler):
    """Shows what was damaged and is made again, each once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self.shown:
            self.shown.add(text)
            from runner.cli.out import say

            say(f"note: {text}")
