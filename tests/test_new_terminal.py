"""`runner new` as a person meets it: what it asks on a terminal, what it says, and the files that it leaves."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli

from runner.inputs.select import LEAST_FOR_ERROR
from runner.plan.device import Card, listed_by
from runner.plan.estimate import figures
from runner.plan.propose import Wishes, propose
from runner.plan.render import size_text
from tests.inprocess import planned, prepared
from tests.support import ROOT, Place, draw_pictures

GB = 10**9


@pytest.fixture
def bare(place: Place) -> Place:
    """A model and pictures, and no run.toml."""
    place.file.unlink()
    return place


def on_a_terminal(place: Place, typed: str, *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, what the terminal showed) of `runner new` with these lines typed."""
    main, end = os.openpty()
    environment = {**os.environ, "NO_COLOR": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    environment.pop("RUNNER_STORE", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "runner", "new", "--model", "model", "--images", "pics", *arguments],
        cwd=place.folder,
        env=environment,
        stdin=end,
        stderr=end,
        stdout=subprocess.PIPE,
        text=True,
    )
    os.close(end)
    os.write(main, typed.encode())
    stdout, _ = process.communicate(timeout=600)
    shown = b""
    while True:
        try:
            more = os.read(main, 4096)
        except OSError:  # the other end is closed
            break
        if not more:
            break
        shown += more
    os.close(main)
    return process.returncode, stdout, shown.decode().replace("\r\n", "\n")


def test_it_asks_for_what_is_not_given(bare: Place) -> None:
    code, stdout, shown = on_a_terminal(bare, "two words\nmine\nlora\n12 parsecs\n12\n")
    assert (code, stdout) == (0, "run.toml\n"), shown
    assert "Name of the run [pics]: " in shown
    assert "Error: letters, digits, and . _ - between them" in shown
    assert "Train an adapter (lora) or the whole model (full)? (lora, full) [lora]: " in shown
    assert "Memory of the GPU that will train, e.g. 12GB (empty: leave it open)" in shown
    assert "Error: write it as 12GB" in shown
    assert "fits into 12.0 GB as it is" in shown
    assert prepared(bare.file).config.run.name == "mine"


def test_it_asks_for_nothing_that_is_given(bare: Place) -> None:
    code, _, shown = on_a_terminal(bare, "", "--name", "x", "--method", "lora", "--memory", "8")
    assert code == 0
    assert "?" not in shown
    assert "Name of the run" not in shown


def test_elsewhere_it_asks_nothing_and_says_what_comes_next(bare: Place) -> None:
    result = bare.run("new", "--model", "model", "--images", "pics", "--out", "sub dir/my run.toml").ok()
    assert result.out == "sub dir/my run.toml\n"
    lines = result.err.splitlines()
    assert lines[0] == "Stable Diffusion 1.5, 10 pictures, 1,500 steps"
    assert lines[1] == (
        "nothing is held out, which needs 60 pictures: the checkpoint is chosen by training items, which cannot show overfitting"
    )
    assert lines[-3:] == [
        "next, to look at the plan and to train:",
        "  runner plan 'sub dir/my run.toml'",
        "  runner apply 'sub dir/my run.toml'",
    ]
    file = bare.folder / "sub dir" / "my run.toml"
    first = file.read_text(encoding="utf-8").splitlines()[0]
    schema = file.parent / first.removeprefix("#:schema ")
    assert json.loads(schema.read_text(encoding="utf-8"))["title"] == "run.toml"
    planned_line = bare.run("plan", "sub dir/my run.toml").ok().out
    figure = next(line for line in planned_line.splitlines() if line.startswith("  memory")).split()[1]
    assert f"predicted peak memory: {figure} MB on the CPU, 0.5 GB for the libraries included" in result.err


def test_a_schema_that_is_there_is_left(bare: Place) -> None:
    (bare.folder / "run.schema.json").write_text("{}")
    bare.run("new", "--model", "model", "--images", "pics").ok()
    assert (bare.folder / "run.schema.json").read_text() == "{}"


def proposed(place: Place, images: Path, memory: int | None = None) -> tuple[dict[str, Any], list[str]]:
    wishes = Wishes(
        model=str(place.folder / "model"),
        images=images,
        method="lora",
        class_tokens=None,
        name="x",
        memory=memory,
        settings=(),
    )
    found = propose(wishes, place.file)
    place.text(found.text)
    return tomli.loads(found.text), found.notes


@pytest.mark.parametrize(("pictures", "held_out"), [(59, 0), (60, 12), (200, 20), (400, 32)])
def test_enough_is_held_out_or_nothing(
    tmp_path: Path, bare: Place, pictures: int, held_out: int, tiny_models: Callable[[str], Path]
) -> None:
    draw_pictures(tmp_path / "many", pictures, size=64)
    document, notes = proposed(bare, tmp_path / "many")
    assert document["dataset"].get("held_out", {}).get("count", 0) == held_out
    assert held_out == 0 or held_out >= LEAST_FOR_ERROR
    assert any(f"{held_out} pictures held out" in note for note in notes) == bool(held_out)
    run = prepared(bare.file)
    assert (len(run.collection.items), len(run.collection.held_out)) == (pictures - held_out, held_out)


def test_the_memory_said_is_the_plans(bare: Place) -> None:
    """One figure: of new, of --fit and of the plan."""
    _, notes = proposed(bare, bare.folder / "pics", 8 * GB)
    numbers = figures(planned(bare.file), None, "cuda")
    assert (
        f"fits into 8.00 GB as it is: {size_text(numbers.peak)} predicted on a GPU, 0.9 GB for the libraries included"
        in notes
    )


class Driver:
    """CUDA's driver API, as far as it is asked, for two cards of which one does not answer."""

    def __init__(self, started: int = 0) -> None:
        self.started = started

    def cuInit(self, flags: int) -> int:
        return self.started

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:
        device._obj.value = 40 + number
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: ctypes.c_int) -> int:
        name.value = b"Card %d" % device.value
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, device: ctypes.c_int) -> int:
        memory._obj.value = 24 * 2**30
        return 0 if device.value == 40 else 1


def test_the_cards_of_this_machine() -> None:
    assert listed_by(Driver()) == [Card("Card 40", 24 * 2**30)]
    assert listed_by(Driver(started=100)) == [], "a driver without a device"
