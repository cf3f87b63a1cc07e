"""Printing: data to stdout, the rest to stderr, colours only on a terminal and never under NO_COLOR."""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

import click

from runner.errors import Diagnostic, visible

_NOT_IN_JSON = re.compile(r"[\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_OWN_STYLES = re.compile(r"(\x1b\[(?:0|1|2|3[0-7]|9[0-7])m)")


def colours(stream: Any) -> bool:
    """Whether a stream gets colours."""
    return not os.environ.get("NO_COLOR") and stream.isatty()


def shown(text: str) -> str:
    """A text as it may be sent: control characters are spelt out, but for the styles that are our own."""
    return "".join(part if number % 2 else visible(part) for number, part in enumerate(_OWN_STYLES.split(text)))


def data(text: str) -> None:
    """A result, to stdout."""
    click.echo(shown(text), color=colours(sys.stdout))


def say(text: str) -> None:
    """A message, to stderr."""
    click.echo(shown(text), err=True, color=colours(sys.stderr))


def record(content: Any) -> None:
    """JSON, to stdout."""
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    click.echo(_NOT_IN_JSON.sub(lambda match: f"\\u{ord(match.group()):04x}", text))


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
