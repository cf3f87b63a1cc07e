"""Whether a run was asked to stop; torch-free."""

from __future__ import annotations

import threading

from runner.errors import Exit


class StopFlag:
    """Set by a signal; carries the exit code that the signal asks for."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.code = Exit.INTERRUPTED

    def set(self, code: Exit) -> None:
        self.code = code
        self._event.set()

    def is_set(self) -> bool:
        return self._event.is_set()
