"""The learning rate in the log and in the report is the one that the optimizer takes, whatever finds it."""

from __future__ import annotations

import json
import math
import types
from typing import Any

import pytest
import torch
from torch import nn

from runner.cli.progress import TensorBoard
from runner.optim.build import build_optimizer, parameter_groups
from runner.optim.rates import effective_rates
from runner.optim.single import SingleOptions
from schemas.training import Optimizer
from tests.inprocess import applied, prepared
from tests.support import Place


def stepped(kind: str, steps: int, options: SingleOptions | None = None, lr: float = 0.01, **settings: Any) -> Any:
    """An optimizer over two components after steps on a quadratic, as the loop takes them."""
    torch.manual_seed(0)
    parameters = {"denoiser.a": nn.Parameter(torch.randn(8, 8)), "text_encoder_1.b": nn.Parameter(torch.randn(8, 2))}
    groups = parameter_groups(parameters, {"denoiser": lr, "text_encoder_1": lr}, by_place=kind == "muon")
    optimizer: Any = build_optimizer(Optimizer(type=kind, **settings), groups, options)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(steps):
        sum((parameter**2).sum() for parameter in parameters.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, parameters


@pytest.mark.parametrize("kind", ["adamw", "lion", "adamw8bit", "adafactor", "muon", "torch.optim.NAdam"])
def test_a_rate_that_is_given_is_logged_as_given(kind: str) -> None:
    optimizer, _ = stepped(kind, 2)
    assert effective_rates(optimizer) == {"lr/denoiser": 0.01, "lr/text_encoder_1": 0.01}
    single, _ = stepped(kind, 2, SingleOptions(offload=True))
    assert effective_rates(single) == {"lr/denoiser": 0.01, "lr/text_encoder_1": 0.01}


def test_prodigy_logs_d_times_lr() -> None:
    optimizer, _ = stepped("prodigy", 12, lr=0.5, args={"d0": 1e-4})
    d = optimizer.param_groups[0]["d"]
    assert d > 2e-4, "it has begun to grow"
    assert effective_rates(optimizer) == {
        "lr/denoiser": 0.5 * d,
        "lr/text_encoder_1": 0.5 * d,
        "d/denoiser": d,
        "d/text_encoder_1": d,
    }


class Estimating(torch.optim.SGD):
    """As D-Adaptation's classes keep it: a distance in the group, here a tensor, and no names of groups."""

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            group.pop("name")
            group["d"] = torch.tensor(0.25)


def test_a_class_by_its_full_name_that_keeps_a_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("estimating")
    module.Estimating = Estimating  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "estimating", module)
    monkeypatch.setattr(
        "runner.config.optimizer_kinds.importlib.metadata.packages_distributions", lambda: {"estimating": ["x"]}
    )
    optimizer, _ = stepped("estimating.Estimating", 1, lr=0.5)
    assert effective_rates(optimizer) == {"lr/0": 0.125, "lr/1": 0.125, "d/0": 0.25, "d/1": 0.25}


def test_adafactor_logs_the_steps_that_it_finds() -> None:
    """Relative steps: 1 / sqrt(step), or 1e-6 * step in its warm-up, times the tensors' size where that counts."""
    found = ({"relative_step": True}, {"relative_step": True, "warmup_init": True})
    rates = [effective_rates(stepped("adafactor", 4, args=args)[0])["lr/denoiser"] for args in found]
    assert rates == [1e-2, pytest.approx(4e-6)]
    optimizer, parameters = stepped("adafactor", 4, args={"scale_parameter": True})
    state = optimizer.state[parameters["denoiser.a"]]
    assert effective_rates(optimizer)["lr/denoiser"] == pytest.approx(0.01 * float(state["RMS"]))
    late, _ = stepped("adafactor", 1, args={"relative_step": True})
    for entry in late.state.values():
        entry["step"] = 40_000
    assert effective_rates(late)["lr/denoiser"] == pytest.approx(1 / math.sqrt(40_000))


def test_schedule_free_logs_its_own_warm_up() -> None:
    rates = [
        effective_rates(stepped("schedule_free_adamw", steps, args={"warmup_steps": 4})[0])["lr/denoiser"]
        for steps in (1, 2, 4, 5)
    ]
    assert rates == pytest.approx([0.0025, 0.005, 0.01, 0.01])


def step_lines(place: Place) -> list[dict[str, Any]]:
    run = prepared(place.file)
    lines = (run.output_dir / "logs" / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["type"] == "step"]


def test_a_run_with_prodigy(place: Place) -> None:
    """In the events, the history of the report, and the chart; a log line is where the device is waited for."""
    optimizer = {"type": "prodigy", "args": {"d0": 1e-5}}
    place.write({"training": {"optimizer": optimizer, "learning_rate": 1.0, "logging": {"every_n_steps": 2}}})
    applied(place.file)
    lines = step_lines(place)
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(line["lr"] == line["d"] for line in lines)
    assert 1e-5 < lines[-1]["lr"] < 0.1
    assert len({line["lr"] for line in lines}) > 1
    page = (place.output / "report.html").read_text(encoding="utf-8")
    chart = page.partition("Learning rate")[2].partition("</svg>")[0]
    assert "polyline" in chart
    assert ">1</text>" not in chart, "not the 1.0 that the file says"


def test_tensorboard_has_every_rate(tmp_path: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path)
    board.hear(
        {"type": "step", "step": 1, "total": 2, "loss": 0.5, "steps_per_second": 1.0, "lr/denoiser": 0.1, "d": 0.2}
    )
    board.close()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    names = set(found.Tags()["scalars"])
    assert names == {"train/loss", "train/steps_per_second", "train/lr/denoiser", "train/d"}


def test_steps_that_do_not_log_read_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(optimizer: Any) -> dict[str, float]:
        calls.append(1)
        return effective_rates(optimizer)

    monkeypatch.setattr("runner.core.fit.effective_rates", counted)
    place.write({"training": {"logging": {"every_n_steps": 3}}})
    applied(place.file, until="train")
    assert len(calls) == 2


def test_the_chart_has_every_group() -> None:
    """Groups that are alike share a line; more than four kinds of line are still drawn."""
    from runner.report.page import _rates

    history = [
        {
            "step": step,
            **{f"lr/{name}": rate * step for name, rate in zip("abcdefg", (1, 1, 2, 3, 4, 5, 6), strict=True)},
        }
        for step in (1.0, 2.0)
    ]
    found = _rates(history)
    assert [names for _, names in found] == [["a", "b"], ["c"], ["d"], ["e"], ["f"], ["g"]]
    assert found[1][0] == ((1.0, 2.0), (2.0, 4.0))
