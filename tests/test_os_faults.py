"""A call of the system that fails ends an apply with its path and reason; the next one goes on and comes to the same bytes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.commands import said
from tests.damage import finished_run
from tests.os_faults import CALLS, Fault, applied_with, chained
from tests.support import Place, new_place, run_bytes

FAULTS = [
    ("mkdir", ".runner/items", 1, errno.EACCES),
    ("write", "items/latents", 2, errno.ENOSPC),
    ("open", "events.jsonl", 1, errno.EMFILE),
    ("write", "events.jsonl", 3, errno.EDQUOT),
    ("rename", "checkpoints/step-", 1, errno.EROFS),
    ("fsync", "states/", 2, errno.EIO),
    ("rename", "artifacts/train", 1, errno.EPERM),
    ("write", "items/samples", 1, errno.EIO),
    ("rename", "artifacts/select", 1, errno.ENOTDIR),
    ("mkdir", "exports", 1, errno.ELOOP),
    ("fsync", "published/", 1, errno.ENOSPC),
    ("rename", "linked/", 1, errno.ENAMETOOLONG),
]
"""What fails, in the order of an apply; `python -m tests.os_faults` has every call fail."""


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Place:
    return finished_run(tmp_path_factory.mktemp("faults") / "calm", tiny_model)


@pytest.fixture
def place(calm: Place, tmp_path: Path, tiny_model: Path) -> Place:
    made = new_place(tmp_path / "place", tiny_model, pictures=6)
    made.file.write_text(calm.file.read_text())
    return made


def test_failing_calls_are_named_and_change_no_byte(place: Place, calm: Place) -> None:
    for call, part, count, code in FAULTS:
        fault = Fault(place.folder, call, part, count, code)
        result = applied_with(place, fault)
        assert fault.hit, f"{call} {part}: did not come by"
        assert result.code == 1, f"{call} {part}: {result.err[-800:]}"
        last = result.err[result.err.index("error: ") :]
        full = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
        can = "read or written" if call == "open" else "written"
        assert part.strip("/") in last and (full.get(code) or f"cannot be {can}: {os.strerror(code)}") in last, last
        assert "the state is kept" in last or "something else is in its place" in last, last
    assert said(place, "apply", "--yes").code == 0
    assert run_bytes(place.output) == run_bytes(calm.output)
    assert not list(place.folder.rglob(".tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_every_failing_call_changes_no_byte(place: Place, calm: Place, call: str) -> None:
    assert chained(place, call, run_bytes(calm.output)) > 3
