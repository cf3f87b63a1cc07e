"""Ctrl+C and SIGTERM ask the run to stop with its state saved; a second Ctrl+C ends it at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from runner.cli import out
from runner.errors import Exit
from runner.stages.stop import StopFlag


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Handles the signals for the block."""
    stop = StopFlag()

    def handle(number: int, _: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set(Exit.INTERRUPTED if number == signal.SIGINT else Exit.TERMINATED)
        out.say(
            "stopping: the state is saved first" + ("; Ctrl+C again stops at once" if number == signal.SIGINT else "")
        )

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
