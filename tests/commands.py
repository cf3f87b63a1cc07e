"""The command line in this process, for tests that call it often."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from dataclasses import dataclass

from runner.cli.main import run
from tests.support import Place


@dataclass
class Said:
    """What a command gave back."""

    code: int
    out: str
    err: str


def said(place: Place, *arguments: str) -> Said:
    """Runs a command in a place's folder."""
    out, err, before, argv = io.StringIO(), io.StringIO(), os.getcwd(), sys.argv
    try:
        os.chdir(place.folder)
        sys.argv = ["runner", *arguments]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run()
    finally:
        os.chdir(before)
        sys.argv = argv
    return Said(int(code), out.getvalue(), err.getvalue())
