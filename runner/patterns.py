"""Regular expressions that a user writes: searched in the names of layers with a bound on the time.

Python's own `re` cannot be stopped, and some short expressions take it longer than the universe will last. `regex` is told
when to give up. An expression must be one for both, so that it means what Python's documentation says.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from functools import cache

from runner.errors import Invalid

SECONDS = 1.0
"""For all names of a model; an ordinary expression takes some milliseconds."""


def pattern_problem(text: str) -> str | None:
    """Why a text is no regular expression; None where it is one."""
    try:
        re.compile(text)
        _compiled(text)
    except re.error as error:
        return str(error)
    except (ValueError, OverflowError, RecursionError, MemoryError) as error:
        return str(error) or "it is nested too deeply"
    return None


@cache
def _compiled(text: str) -> Callable[..., object]:
    import regex  # takes some milliseconds, and few runs have expressions

    try:
        return regex.compile(text).search
    except regex.error as error:
        raise re.error(str(error)) from None


class BadPattern(Invalid):
    """No regular expression."""


class SlowPattern(Invalid):
    """An expression that takes too long."""

    def __init__(self, pattern: str) -> None:
        super().__init__(
            f"the regular expression {pattern!r} takes too long", hint="write it without a repetition in a repetition"
        )
        self.pattern = pattern


class Search:
    """Whether names match expressions. Raises `BadPattern` when made, `SlowPattern` later."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns: dict[str, Callable[..., object]] = {}
        for text in patterns:
            problem = pattern_problem(text)
            if problem is not None:
                raise BadPattern(f"{text!r} is not a regular expression: {problem}")
            self.patterns[text] = _compiled(text)
        self.left = dict.fromkeys(self.patterns, SECONDS)

    def matches(self, text: str, name: str) -> bool:
        """Whether one expression is found in a name."""
        begun = time.process_time()
        try:
            return self.patterns[text](name, timeout=max(self.left[text], 0.001)) is not None
        except TimeoutError:
            raise SlowPattern(text) from None
        finally:
            self.left[text] -= time.process_time() - begun

    def any(self, name: str) -> bool:
        """Whether one of the expressions is found in a name."""
        return any(self.matches(text, name) for text in self.patterns)
