"""Progress of an apply: a live line on a terminal, plain lines otherwise; and TensorBoard."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from runner.cli import out

PLAIN_EVERY = 10.0
"""Seconds between plain lines of one stage."""


class Progress(Protocol):
    """Hears events and shows them."""

    def hear(self, event: dict[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...


@contextmanager
def make_progress() -> Iterator[Progress]:
    """A live display on a terminal, else plain lines."""
    if sys.stderr.isatty() and not _dumb():
        with _live() as live:
            yield live
    else:
        yield Plain()


def _dumb() -> bool:
    import os

    return os.environ.get("TERM") == "dumb"


def memory_text() -> str:
    """The peak so far: of the GPU's memory where one is used, else of this process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB GPU"
    import psutil

    return f"{psutil.Process().memory_info().rss / 1e9:.2f} GB"


def _step_text(event: dict[str, Any]) -> str:
    rate = event["steps_per_second"]
    left = (event["total"] - event["step"]) / rate if rate > 0 else 0.0
    speed = f"{rate:.2f} steps/s" if rate >= 1 else f"{1 / rate:.2f} s/step" if rate > 0 else ""
    learning = next((value for name, value in event.items() if name == "lr" or name.startswith("lr/")), 0.0)
    return f"loss {event['loss']:.4f}  lr {learning:.2e}  {speed}  {_clock(left)} left  {memory_text()}"


def _clock(seconds: float) -> str:
    whole = int(seconds + 0.5)
    return (
        f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
        if whole >= 3600
        else f"{whole // 60}:{whole % 60:02d}"
    )


def _message(event: dict[str, Any]) -> str | None:
    """The line that an event leaves behind, if any."""
    kind, stage = event["type"], event["stage"]
    if kind == "warning":
        return f"warning: {event['text']}"
    if kind == "note":
        return f"{stage}: {event['text']}"
    if kind == "resumed":
        return f"{stage}: goes on from step {event['step']} of {event['total']}"
    if kind == "checkpoint":
        return f"{stage}: checkpoint at step {event['step']}"
    return None


class Plain:
    """One line now and then; for logs and pipes."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}

    def note(self, text: str) -> None:
        out.say(text)

    def hear(self, event: dict[str, Any]) -> None:
        message = _message(event)
        if message is not None:
            out.say(message)
        elif event["type"] in ("step", "progress"):
            done = event["step"] if event["type"] == "step" else event["done"]
            now, stage = time.monotonic(), event["stage"]
            if done < event["total"] and now - self.last.get(stage, 0.0) < PLAIN_EVERY:
                return
            self.last[stage] = now
            detail = "  " + _step_text(event) if event["type"] == "step" else ""
            out.say(f"{stage} {done}/{event['total']}{detail}")


@contextmanager
def _live() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    bars = Bars(
        TextColumn("{task.description:<14}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        console=console,
        transient=False,
    )

    class Live:
        """One bar a stage."""

        def __init__(self) -> None:
            self.tasks: dict[str, Any] = {}

        def note(self, text: str) -> None:
            bars.console.print(out.shown(text), highlight=False, markup=False)

        def hear(self, event: dict[str, Any]) -> None:
            message = _message(event)
            if message is not None and event["type"] != "checkpoint":
                self.note(message)
            if event["type"] not in ("step", "progress", "started"):
                return
            stage, total = event["stage"], event["total"]
            if stage not in self.tasks:
                self.tasks[stage] = bars.add_task(stage, total=total, detail="")
            done = event["step"] if event["type"] == "step" else event.get("done", 0)
            detail = _step_text(event) if event["type"] == "step" else ""
            bars.update(self.tasks[stage], completed=done, total=total, detail=detail)

    with bars:
        yield Live()


class TensorBoard:
    """Writes scalars of the steps; the library is loaded with the first of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None
        self.resumed_from: int | None = None

    def hear(self, event: dict[str, Any]) -> None:
        if event["type"] == "resumed":
            self.resumed_from = event["step"]
        if event["type"] != "step":
            return
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=self.resumed_from)
        for name, value in event.items():
            if name in ("loss", "grad_norm", "steps_per_second") or name.partition("/")[0] in ("lr", "d"):
                self.writer.add_scalar(f"train/{name}", value, event["step"])

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
