"""The program's edge: what the system refused is named with its path; a bug's report is short, and never fails itself."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import click
import pytest

from runner.atomic import CannotWrite, writing
from runner.cli import main
from runner.errors import Exit


def ended(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    """The exit code of a command that raises."""

    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(main.cli, "main", fail)
    return main.run()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            CannotWrite(errno.EIO, "Input/output error", "/a/b"),
            "error: /a/b cannot be written: Input/output error\nhint: apply again once that is mended: the state is kept\n\n",
        ),
        (
            CannotWrite(errno.EISDIR, "Is a directory", "/a/b"),
            "error: /a/b cannot be written: Is a directory\nhint: something else is in its place: move or delete it\n\n",
        ),
        (
            CannotWrite(errno.ENOSPC, "No space left on device", "/a/b"),
            "error: the disk is full: /a/b cannot be written\nhint: free some space and apply again: the state is kept\n\n",
        ),
        (
            CannotWrite(errno.EDQUOT, "Disk quota exceeded", "/a/b"),
            "error: the disk quota is used up: /a/b cannot be written\n"
            "hint: free some space and apply again: the state is kept\n\n",
        ),
        (
            OSError(errno.EMFILE, "Too many open files", "/a/b"),
            "error: /a/b cannot be read or written: Too many open files\n"
            "hint: allow more open files (ulimit -n) and apply again: the state is kept\n\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "error: the disk is full: a file cannot be written\nhint: free some space and apply again: the state is kept\n\n",
        ),
    ],
)
def test_what_the_system_refused_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: OSError, message: str
) -> None:
    assert ended(monkeypatch, error) == Exit.FAILED
    assert capsys.readouterr().err == message


def test_an_error_without_a_path_gets_that_of_what_was_written(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite) as caught, writing(tmp_path / "a"):
        raise OSError(errno.EIO, "Input/output error")
    assert caught.value.filename == str(tmp_path / "a")
    assert (caught.value.errno, caught.value.strerror) == (errno.EIO, "Input/output error")


class Huge(Exception):
    def __str__(self) -> str:
        return "x" * 300_000_000


class Worse(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


def report_of(err: str) -> Path:
    return Path(err.strip().rpartition("with the file ")[2])


@pytest.mark.parametrize("error", [Huge(), Worse(), KeyError("\ud800\x1b[2J"), RecursionError("deep")])
def test_a_bug_s_report_is_short(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def deep(depth: int) -> None:
        if depth:
            deep(depth - 1)
        raise error

    def fail(**_: object) -> None:
        try:
            raise Huge
        except Huge:
            deep(600)

    monkeypatch.setattr(main.cli, "main", fail)
    assert main.run() == Exit.FAILED
    err = capsys.readouterr().err
    assert len(err) < 2000
    assert err.startswith(f"error: this is a bug in runner: {type(error).__name__}: ")
    assert "\x1b" not in err
    report = report_of(err)
    assert report.stat().st_size < 200_000
    assert "which led to:" in report.read_text()
    report.unlink()


def test_where_no_report_can_be_written_it_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    assert ended(monkeypatch, KeyError("x")) == Exit.FAILED
    err = capsys.readouterr().err
    assert "no file of it could be written: No such file or directory" in err
    assert "builtins.KeyError: 'x'" in err
    assert "Traceback" not in err


def test_a_closed_stderr_is_no_second_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    closed = open(tmp_path / "err", "w")  # noqa: SIM115
    closed.close()
    monkeypatch.setattr("sys.stderr", closed)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    assert ended(monkeypatch, KeyError("x")) == Exit.FAILED


def test_an_interrupted_question_is_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ended(monkeypatch, click.Abort()) == Exit.INTERRUPTED


def test_full_devices_name_their_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")

    def fail(**_: object) -> None:
        with writing(Path("/dev/full")), open("/dev/full", "w") as stream:
            stream.write("x")

    monkeypatch.setattr(main.cli, "main", fail)
    assert main.run() == Exit.FAILED
    assert "error: the disk is full: /dev/full cannot be written" in capsys.readouterr().err
