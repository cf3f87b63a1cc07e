"""events.jsonl: one JSON object a line, appended: {v, time, attempt, seq, stage, step, type, …}. Torch-free.

A resume appends `resumed` with the step it starts from; `read_events` drops the lines of steps that were done again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from runner.atomic import make_folder, refuse_devices, writing

EVENTS_VERSION = 1
_MOST = 2**40
"""No step or second is so large; a calendar still knows it."""
Listener = Callable[[dict[str, Any]], None]


class Events:
    """The log of a run; listeners (progress, TensorBoard) hear every event as it is written."""

    def __init__(self, file: Path | None, listeners: tuple[Listener, ...] = ()) -> None:
        self.file = file
        self.listeners = list(listeners)
        self.stage = "run"
        self.seq = 0
        self.attempt = 1
        self._stream = None
        if file is not None:
            make_folder(file.parent)
            refuse_devices(file)
            self.attempt = 1 + max((event.get("attempt", 0) for event in _lines(file)), default=0)
            with writing(file):
                _end_last_line(file)
                self._stream = open(file, "a", encoding="utf-8")  # noqa: SIM115 - open for the whole run

    def emit(self, kind: str, step: int | None = None, **content: Any) -> None:
        """Writes one event and tells the listeners. Numbers that are not finite are written as null."""
        self.seq += 1
        event = {
            "v": EVENTS_VERSION,
            "time": round(time.time(), 3),
            "attempt": self.attempt,
            "seq": self.seq,
            "stage": self.stage,
            "step": step,
            "type": kind,
            **content,
        }
        if self._stream is not None:
            assert self.file is not None
            with writing(self.file):
                self._stream.write(json.dumps(_finite(event), ensure_ascii=False) + "\n")
                self._stream.flush()
        for listener in self.listeners:
            listener(event)

    def close(self) -> None:
        """What could not be written was said when it was emitted."""
        if self._stream is not None:
            with suppress(OSError):
                self._stream.close()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def _end_last_line(file: Path) -> None:
    """A kill may leave half a line; the next event must not join it."""
    if file.exists() and file.stat().st_size:
        with open(file, "rb+") as stream:
            stream.seek(-1, 2)
            if stream.read(1) != b"\n":
                stream.write(b"\n")


def _is_event(event: Any) -> bool:
    """Whether a line is an event as this version writes them."""
    if not isinstance(event, dict) or not isinstance(event.get("type"), str):
        return False
    if any(not isinstance(event.get(name), (str, type(None))) for name in ("stage", "text", "reason")):
        return False
    numbers = [event.get("v", 0), event.get("attempt", 0), event.get("step") or 0, event.get("time", 0.0)]
    if event["type"] == "step":
        numbers += [event.get("total"), event.get("steps_per_second", 0.0)]
        loss = event.get("loss") or 0.0
        if not isinstance(loss, (int, float)) or not abs(loss) < 1e308:  # a run that diverges has what losses it has
            return False
    return (
        all(isinstance(number, (int, float)) and abs(number) < _MOST for number in numbers)
        and numbers[0] <= EVENTS_VERSION
    )


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        return
    with open(file, encoding="utf-8", errors="replace") as stream:
        for line in stream:
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue  # the half line of a killed process
            if _is_event(event):
                yield event


def read_events(file: Path) -> list[dict[str, Any]]:
    """All events that still hold: where training was resumed from step s, earlier lines of later steps are gone."""
    events: list[dict[str, Any]] = []
    for event in _lines(file):
        if event.get("type") == "resumed":
            start, stage = event.get("step") or 0, event.get("stage")
            events = [
                old for old in events if old.get("stage") != stage or old.get("step") is None or old["step"] <= start
            ]
        events.append(event)
    return events
