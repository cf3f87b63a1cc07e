"""Writes files beside the training: one at a time, in order; what goes wrong is raised at the next call."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Writer:
    """At most one write is under way; a second waits for it, so that never more than one copy is held."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._pending: Future[object] | None = None
        self.step: int | None = None
        """The training step of the write that is under way."""

    def submit(self, step: int, write: Callable[[], object]) -> None:
        """Begins a write."""
        self.wait()
        self.step = step
        self._pending = self._pool.submit(write)

    def wait(self) -> None:
        """Returns when nothing is under way. Raises what the write raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
        self.step = None

    def close(self) -> None:
        """Waits, and lets the thread go."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
