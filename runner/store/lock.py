"""Locks of the operating system: they die with the process, so nothing has to be cleaned after a kill."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from runner.errors import Held


@contextmanager
def held(file: Path, what: str, wait_seconds: float = 0) -> Iterator[None]:
    """Holds a lock for the block. Raises `Held`, which names the holder, where another process has it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file, timeout=wait_seconds)
    note = file.with_suffix(".holder")
    try:
        lock.acquire()
    except Timeout:
        raise Held(f"{what} is held by {_holder(note)}", hint="wait for it, or stop that process") from None
    try:
        note.write_text(
            json.dumps({"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}),
            encoding="utf-8",
        )
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def is_held(file: Path) -> bool:
    """Whether a process holds the lock now."""
    if not file.exists():
        return False
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return True
    lock.release()
    return False


def _holder(note: Path) -> str:
    try:
        holder = json.loads(note.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
