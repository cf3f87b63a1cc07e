"""What is written for people outside of an apply: a full disk or a kill leaves whole files or none, and nothing is lost."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from runner.cli.schema import schema_text
from runner.store.run_folder import free_name
from tests.commands import said
from tests.fuzzing import bounded
from tests.os_faults import Fault, failing
from tests.support import Place, draw_pictures


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "mkdir"])
def test_a_copy_of_a_recipe_is_whole_or_not_there(tmp_path: Path, call: str) -> None:
    """Each call of the kind fails in turn."""
    place, own, failures, refused = Place(tmp_path), tmp_path / "own", 0, 0
    while True:
        fault = Fault(tmp_path, call, "", failures + 1, errno.ENOSPC)
        with failing(fault):
            result = said(place, "copy", "sdxl-lora", str(own))
        if not fault.hit:
            break
        failures += 1
        if fault.hit == [str(tmp_path)] or (call == "mkdir" and result.code == 0):
            shutil.rmtree(own)  # its name did not come to the disk, or a folder was made that was there already
            continue
        refused += 1
        assert (result.code, result.out) == (1, ""), fault.hit
        assert result.err.startswith(f"error: the disk is full: {own} cannot be written\n"), fault.hit
        assert os.listdir(tmp_path) == [], fault.hit
    assert refused > 0
    assert result.code == 0
    assert sorted(os.listdir(own)) == ["run.schema.json", "run.toml"]


def test_a_copy_into_a_folder_that_is_there(tmp_path: Path) -> None:
    """The run.toml comes last: what a kill leaves is no run."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("mine")
    place, own = Place(tmp_path), tmp_path / "own"
    with failing(Fault(tmp_path, "write", "run.toml", 1, errno.EIO)) as fault:
        result = said(place, "copy", "sdxl-lora", str(own))
    assert fault.hit
    assert result.err.startswith(f"error: {own / 'run.toml'} cannot be written: Input/output error\n")
    assert sorted(os.listdir(own)) == ["notes.txt", "run.schema.json"]
    assert (own / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("part", ["run.toml", "run.schema.json"])
@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_new_run_is_whole_or_not_there(tmp_path: Path, call: str, part: str) -> None:
    draw_pictures(tmp_path / "pics", 3)
    place = Place(tmp_path)
    arguments = ("new", "--model", "builtin:micro", "--images", "pics", "--out", str(place.file))
    with failing(Fault(tmp_path, call, part, 1, errno.ENOSPC)) as fault:
        result = said(place, *arguments)
    assert fault.hit
    assert result.code == 1
    assert result.err.endswith("free some space and apply again: the state is kept\n\n")
    assert not place.file.exists() or fault.hit == [str(tmp_path)]
    assert not list(tmp_path.glob("*.tmp-*")) + list(tmp_path.glob(".tmp-*"))
    assert said(place, *arguments).code == 0
    assert (tmp_path / "run.schema.json").read_text() == schema_text()


def test_a_plan_is_not_written_over_its_run(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.text("mine")
    for name in ("run.toml", "./run.toml", str(place.file)):
        refused = said(place, "plan", "run.toml", "--out", name)
        assert refused.code == 64
        assert (
            refused.err
            == f"error: --out {Path(name)} is the run itself\nhint: name another file, plan.json for instance\n\n"
        )
    assert place.file.read_text() == "mine"


def test_a_made_picture_takes_no_name_of_anything_else(tmp_path: Path) -> None:
    """A pipe is not read, a folder and a link without a target are no places to write to."""
    path = tmp_path / "a.png"
    assert free_name(path, b"x") == path
    path.write_bytes(b"x")
    assert free_name(path, b"x") == path
    assert free_name(path, b"y") == tmp_path / "a-2.png"
    os.mkfifo(tmp_path / "a-2.png")
    (tmp_path / "a-3.png").mkdir()
    (tmp_path / "a-4.png").symlink_to(tmp_path / "gone")
    with bounded(5):
        assert free_name(path, b"y") == tmp_path / "a-5.png"
