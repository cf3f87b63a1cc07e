"""Printing: data to stdout, the rest to stderr, colours only on a terminal and never under NO_COLOR."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click

from runner.errors import Diagnostic


def colours(stream: Any) -> bool:
    """Whether a stream gets colours."""
    return not os.environ.get("NO_COLOR") and stream.isatty()


def data(text: str) -> None:
    """A result, to stdout."""
    click.echo(text, color=colours(sys.stdout))


def say(text: str) -> None:
    """A message, to stderr."""
    click.echo(text, err=True, color=colours(sys.stderr))


def record(content: Any) -> None:
    """JSON, to stdout."""
    click.echo(json.dumps(content, indent=2, ensure_ascii=False, default=str))


def paint(text: str, colour: str) -> str:
    """Text in a colour; the colour is dropped again where the stream has none."""
    return click.style(text, bold=True) if colour == "bold" else click.style(text, fg=colour)


def diagnostics(findings: tuple[Diagnostic, ...] | list[Diagnostic]) -> None:
    """Findings, to stderr, a blank line between them."""
    for finding in findings:
        text = finding.render()
        head, _, rest = text.partition("\n")
        word, _, message = head.partition(": ")
        coloured = click.style(word, fg="red" if finding.severity == "error" else "yellow", bold=True)
        say(f"{coloured}: {message}" + (f"\n{rest}" if rest else ""))
        say("")
