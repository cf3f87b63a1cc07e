"""Locks of the operating system: they die with the process, so nothing has to be cleaned after a kill."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from runner.atomic import make_folder, writing
from runner.errors import Held
from runner.files import MOST_TEXT_BYTES, read_bytes

if TYPE_CHECKING:
    from runner.store.store import Store

GATE = "store"
"""The lock under which every other lock of a store is taken; gc holds it from its first look to its last deletion."""
GATE_SECONDS = 10.0
_USE = "use-"
LOOK_SECONDS = 0.3
"""`is_held` holds a lock for a moment to find out; whoever wants the lock then waits that long."""


@contextmanager
def run_held(store: Store, output_dir: Path, name: str) -> Iterator[None]:
    """Holds a run for the block. Raises `Held`."""
    with _behind_gate(store, store.run_lock(output_dir), f"run {name!r}"):
        yield


@contextmanager
def in_use(store: Store, what: str) -> Iterator[None]:
    """Keeps gc away for the block, in which `what` reads the store; any number may do so at once. Raises `Held`."""
    file = store.lock_file(f"{_USE}{os.getpid()}")
    try:
        with _behind_gate(store, file, what):
            yield
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)


@contextmanager
def alone(store: Store) -> Iterator[None]:
    """Nothing else works with the store in the block, nor starts to. Raises `Held`, which names who does."""
    gate = store.lock_file(GATE)
    with held(gate, "the store", GATE_SECONDS):
        for file in sorted(gate.parent.glob("*.lock")):
            if file == gate:
                continue
            if is_held(file, LOOK_SECONDS):
                what, holder = _holder(file.with_suffix(".holder"))
                raise Held(
                    f"{what or 'a run'} is going on in {holder}; nothing is deleted",
                    hint="wait for it, or stop that process",
                )
            if file.name.startswith(_USE):  # of a killed process
                file.unlink(missing_ok=True)
        yield


@contextmanager
def _behind_gate(store: Store, file: Path, what: str) -> Iterator[None]:
    with ExitStack() as stack:
        with held(store.lock_file(GATE), "the store", GATE_SECONDS):
            stack.enter_context(held(file, what, LOOK_SECONDS))
        yield


@contextmanager
def held(file: Path, what: str, wait_seconds: float = 0) -> Iterator[None]:
    """Holds a lock for the block. Raises `Held`, which names the holder, where another process has it."""
    make_folder(file.parent)
    lock = FileLock(file, timeout=wait_seconds)
    note = file.with_suffix(".holder")
    try:
        with writing(file):
            lock.acquire()
    except Timeout:
        raise Held(f"{what} is held by {_holder(note)[1]}", hint="wait for it, or stop that process") from None
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = {"what": what, "pid": os.getpid(), "host": platform.node(), "since": since}
        with suppress(OSError):  # only for messages
            note.write_text(json.dumps(holder), encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            note.unlink(missing_ok=True)
        lock.release()


def is_held(file: Path, seconds: float = 0) -> bool:
    """Whether a process holds the lock now, and for longer than so many seconds."""
    if not file.exists():
        return False
    lock = FileLock(file, timeout=seconds)
    try:
        with writing(file):
            lock.acquire()
    except Timeout:
        return True
    lock.release()
    return False


def _holder(note: Path) -> tuple[str | None, str]:
    """(what is held, by whom)."""
    try:
        holder = json.loads(read_bytes(note, MOST_TEXT_BYTES))
        return holder.get("what"), f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, "another process"
