"""Files that somebody names: regular ones only, of a bounded size; and what guards their parsing."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from runner.errors import Invalid
from runner.files import file_problem, name_problem, open_regular, parsing, read_bytes
from tests.fuzzing import bounded


def special(folder: Path, kind: str) -> Path:
    """A file that is none."""
    path = folder / "special"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(str(path))
    else:
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [("pipe", "a named pipe"), ("device", "a device"), ("socket", "a socket"), ("folder", "a folder")],
)
def test_only_regular_files_are_opened(tmp_path: Path, kind: str, words: str) -> None:
    path = special(tmp_path, kind)
    with bounded(2), pytest.raises(OSError) as caught:  # noqa: PT011 - a socket cannot be opened at all
        open_regular(path)
    if kind != "socket":
        assert caught.value.strerror == f"it is {words}, not a file"
    assert file_problem(path) == f"{path} is {words}, not a file"


def test_a_file_is_read_up_to_a_size(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * 1000)
    assert read_bytes(path, 1000) == b"x" * 1000
    assert file_problem(path) is None
    with pytest.raises(OSError, match="it has 1,000 bytes; at most 999 are read"):
        read_bytes(path, 999)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("a\0b", "its name holds a NUL character"),
        ("a\ud800", "its name holds half a character (a lone surrogate)"),
        ("x" * 256, "its name is too long: 255 bytes a part and 4,095 in all are the most"),
        ("ä" * 128, "its name is too long: 255 bytes a part and 4,095 in all are the most"),
        ("x/" * 2048, "its name is too long: 255 bytes a part and 4,095 in all are the most"),
    ],
)
def test_names_that_no_file_can_have(tmp_path: Path, name: str, problem: str) -> None:
    assert name_problem(name) == problem
    found = file_problem(tmp_path / name)
    assert found is not None
    assert found.endswith(problem)
    with pytest.raises(OSError, match="its name"):
        open_regular(tmp_path / name)


@pytest.mark.parametrize("name", ["x" * 255, "x/" * 2047, "old\udce4"])
def test_names_that_a_file_can_have(name: str) -> None:
    assert name_problem(name) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "it is nested too deeply"),
        ("1" * 5000, "a number of it has more than 4,300 digits"),
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    ],
)
def test_what_parsing_raises_becomes_words(text: str, words: str) -> None:
    with pytest.raises(Invalid) as caught, parsing(lambda reason: Invalid(f"f: {reason}")):
        json.loads(text)
    assert str(caught.value) == f"f: {words}"
