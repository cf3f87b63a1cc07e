"""Has calls of the operating system fail in this process: one kind of call, on one kind of path, at its n-th time.

    python -m tests.os_faults [FOLDER]    every call of an apply in turn, with every error

The program under test knows nothing of it. Writes fail where a file object flushes to its file.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from tests.commands import Said, said
from tests.support import Place, run_bytes

CALLS = ("rename", "mkdir", "fsync", "write", "open", "unlink", "link")
CODES = (
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.EROFS,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.EDQUOT,
)


@dataclass
class Fault:
    """Fails the `count`-th call of a kind on a path below `root` that holds `part`."""

    root: Path
    call: str
    part: str
    count: int
    code: int
    calls: int = 0
    hit: list[str] = field(default_factory=list)

    def check(self, call: str, path: Any, named: bool = True) -> None:
        text = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        if call != self.call or self.part not in text or not text.startswith(str(self.root)):
            return
        self.calls += 1
        if self.calls == self.count:
            self.hit.append(text)
            raise OSError(self.code, os.strerror(self.code), *([text] if named else []))


@contextmanager
def failing(fault: Fault) -> Iterator[Fault]:
    """Calls fail as the fault says, for the block."""

    def wrapped(call: str, original: Callable[..., Any], place: int = 0) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            fault.check(call, args[place])
            return original(*args, **kwargs)

        return wrapper

    fsync, opened = os.fsync, io.open

    def failing_fsync(descriptor: int) -> None:
        fault.check("fsync", os.readlink(f"/proc/self/fd/{descriptor}"), named=False)
        fsync(descriptor)

    class File(io.FileIO):
        def write(self, content: Any) -> int:
            fault.check("write", self.name, named=False)
            return super().write(content)

    def failing_open(file: Any, mode: str = "r", buffering: int = -1, *text: Any, **named: Any) -> Any:
        if isinstance(file, int) or not str(file).startswith(str(fault.root)) or named.get("opener"):
            return opened(file, mode, buffering, *text, **named)
        fault.check("open", file)
        if not set(mode) & set("wax+") or fault.call != "write":
            return opened(file, mode, buffering, *text, **named)
        raw = File(file, mode.replace("b", "").replace("t", ""))
        stream: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return stream if "b" in mode else io.TextIOWrapper(stream, *text, **named)

    patches = [
        mock.patch.object(os, "rename", wrapped("rename", os.rename, 1)),
        mock.patch.object(os, "replace", wrapped("rename", os.replace, 1)),
        mock.patch.object(os, "link", wrapped("link", os.link, 1)),
        mock.patch.object(os, "symlink", wrapped("link", os.symlink, 1)),
        mock.patch.object(os, "fsync", failing_fsync),
        mock.patch.object(builtins, "open", failing_open),
        mock.patch.object(io, "open", failing_open),
        *(mock.patch.object(os, call, wrapped(call, getattr(os, call))) for call in ("mkdir", "open", "unlink")),
    ]
    for patch in patches:
        patch.start()
    try:
        yield fault
    finally:
        for patch in patches:
            patch.stop()


def applied_with(place: Place, fault: Fault) -> Said:
    """An apply under a fault: it succeeds, or ends with an error that names a path and a reason."""
    with failing(fault):
        result = said(place, "apply", "--yes")
    where = f"{fault.call} {errno.errorcode[fault.code]} at {fault.hit}"
    assert "Traceback" not in result.err + result.out and "bug in runner" not in result.err, (
        f"{where}\n{result.err[-3000:]}"
    )
    if result.code != 0:
        assert fault.hit, result.err
        assert result.code in (1, 3), f"{where}: exit {result.code}\n{result.err[-3000:]}"
        last = result.err[result.err.index("error: ") :]
        reason = "disk" if fault.code in (errno.ENOSPC, errno.EDQUOT) else os.strerror(fault.code)
        assert reason in last or "cannot be" in last, f"{where}\n{last}"
    return result


def chained(place: Place, call: str, expected: dict[str, bytes]) -> int:
    """Applies again and again with a call failing, each path once, until an apply comes through; returns how many failed.

    What a fault stopped is done by the next apply, which fails at the next call that has not failed yet.
    """
    failures, count, seen = 0, 1, set()
    while True:
        fault = Fault(place.folder, call, "", count, CODES[(failures + len(call)) % len(CODES)])
        applied_with(place, fault)
        if not fault.hit:
            break
        failures += 1
        count += fault.hit[0] in seen
        seen.add(fault.hit[0])
        print(f"{call:<8}{errno.errorcode[fault.code]:<14}{fault.hit[0]}", flush=True)
    result = said(place, "apply", "--yes")
    assert result.code == 0, result.err
    ours = run_bytes(place.output)
    differing = [name for name in {*ours, *expected} if ours.get(name) != expected.get(name)]
    assert not differing, f"{call}: other bytes: {differing}"
    left = [str(path) for path in place.folder.rglob(".tmp-*")]
    assert not left, left
    return failures


def main() -> None:
    from runner.families.registry import family
    from tests.damage import finished_run
    from tests.support import new_place

    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    family("sd15").tiny(folder / "model")
    calm = finished_run(folder / "calm", folder / "model")
    expected = run_bytes(calm.output)
    for call in CALLS:
        place = new_place(folder / call, folder / "model", pictures=6)
        place.file.write_text(calm.file.read_text())
        print(f"{call}: {chained(place, call, expected)} calls failed in turn, all files equal", flush=True)


if __name__ == "__main__":
    main()
