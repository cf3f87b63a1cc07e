"""For tests that give readers what nobody would write: how many examples, and bounds on time and memory for each.

`make test` tries some; `make fuzz` sets RUNNER_FUZZ_EXAMPLES and goes on with other seeds for an hour.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings

from runner.errors import UserError

Test = TypeVar("Test", bound=Callable[..., Any])
Value = TypeVar("Value")
_EXAMPLES = int(os.environ.get("RUNNER_FUZZ_EXAMPLES", "0"))


def fuzz(examples: int = 60) -> Callable[[Test], Test]:
    """Above @given: so many examples in the fast suite, RUNNER_FUZZ_EXAMPLES under `make fuzz`."""
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    own = settings(max_examples=_EXAMPLES or examples, deadline=None, suppress_health_check=health)

    def mark(test: Test) -> Test:
        marked: Test = pytest.mark.fuzz(own(test))
        return marked

    return mark


@contextmanager
def bounded(seconds: float = 5.0, megabytes: int = 600) -> Iterator[None]:
    """Fails where the block takes more of the processor's time, waits for much longer, or makes the process so much larger
    than it ever was."""

    def ring(number: int, _frame: FrameType | None) -> None:
        raise AssertionError(f"it takes more than {seconds} s" if number == signal.SIGVTALRM else "it hangs")

    assert threading.current_thread() is threading.main_thread()
    largest, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    clocks = {signal.ITIMER_VIRTUAL: (signal.SIGVTALRM, seconds), signal.ITIMER_REAL: (signal.SIGALRM, 10 * seconds)}
    before = {number: signal.signal(number, ring) for number, _ in clocks.values()}
    for clock, (_, limit) in clocks.items():
        signal.setitimer(clock, limit)
    try:
        yield
    finally:
        for clock, (number, _) in clocks.items():
            signal.setitimer(clock, 0)
            signal.signal(number, before[number])
    took = time.process_time() - begun  # one call of C is not interrupted
    assert took <= seconds, f"it took {took:.1f} s"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - largest) // 1024
    assert grown <= megabytes, f"it took {grown} MB"


def read_or_refused(read: Callable[[], Value], *errors: type[Exception], seconds: float = 5.0) -> Value | None:
    """What reading gives, or None where it is refused in words (a `UserError`, or one of `errors`); all else fails."""
    with bounded(seconds):
        try:
            return read()
        except (UserError, *errors) as error:
            assert str(error)  # noqa: PT017 - that it raises is one of two right ends
            return None
