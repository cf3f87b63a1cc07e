"""The count of a step (benchmarks/roofline.py): what is counted is right, and a full-size step asks for no more than before."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.counted import CARDS, Meter, keeping
from benchmarks.full_size import SETTINGS, Setting
from benchmarks.pretended import NotPossible, backward, pretended
from benchmarks.roofline import RECORD, count, differences, libraries
from runner.core.precision import autocast

HELD: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
QUICK = ("SD 1.5 512² b1",)
"""Of the others the counts take minutes."""
GPU = torch.device("cuda:0")


@pytest.fixture(autouse=True, scope="module")
def _possible() -> None:
    try:
        with pretended(lambda *_: None):
            pass
    except NotPossible as error:
        pytest.skip(str(error))


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, other: Tensor) -> Tensor:
        return x * factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * 2, None, None


@pytest.mark.parametrize(
    "setting", [pytest.param(s, marks=() if s.title in QUICK else pytest.mark.slow, id=s.title) for s in SETTINGS]
)
def test_a_training_step_asks_for_what_it_did(setting: Setting) -> None:
    if HELD["libraries"] != libraries():
        pytest.skip(f"counted with {HELD['libraries']}, here are {libraries()}")
    changed = differences(HELD["steps"][setting.title], count(setting, everything=False).step.exact())
    assert not changed, "python -m benchmarks.roofline --record, if it is meant:\n" + "\n".join(changed)


def test_what_changed_is_said_by_kind() -> None:
    before = {"operations": {"casts": 1000, "gemm": 2}, "waits": 0}
    after = {"operations": {"gemm": 2, "norms": 1}, "waits": 1}
    assert differences(before, before) == []
    assert differences(before, after) == [
        "operations, casts: 1,000 before, 0 now",
        "operations, norms: 0 before, 1 now",
        "waits: 0 before, 1 now",
    ]


def _counted(make: Callable[[], Callable[[], Any]]) -> Meter:
    """What a function asks for that is made on the pretended GPU."""
    meter = Meter()
    with pretended(meter):
        call = make()
        meter.on = True
        call()
    return meter


def test_a_layer_is_counted_as_a_gpu_runs_it() -> None:
    """Two layers of fp32 weights under autocast: what is cast, multiplied, moved and kept is known by hand."""

    def make() -> Callable[[], Any]:
        first, second = (torch.empty(32, 32, device=GPU).requires_grad_() for _ in range(2))
        x = torch.empty(8, 32, device=GPU)

        def call() -> None:
            assert x.device.type == "cuda"
            with keeping(found, (first, second)), autocast("bf16", GPU):
                loss = F.linear(F.linear(x, first), second).view(-1).float().sum()
            found.phase = "backward"
            loss.backward()

        return call

    found = Meter()
    with pretended(found):
        call = make()
        found.on = True
        call()
    counted = found.count
    assert counted.names["mm"] == 2 + 3, "forward; of the first layer's input no gradient is asked for"
    assert counted.flop == 5 * 2 * 8 * 32 * 32
    assert counted.names["_to_copy"] == 4 + 3, "x, both weights, the answer; its gradient and those of both weights"
    assert counted.operations["casts"] == 7
    mm = 2 * (8 * 32 + 32 * 32 + 8 * 32)
    assert counted.moved["gemm"] == 5 * mm
    assert counted.kept == 2 * (8 * 32 + 8 * 32 + 32 * 32), "x and the first answer in bf16, the second weight too"
    assert counted.operations["gemm"] == 5
    assert counted.waits == 0
    assert all(counted.seconds[card] >= 2.5e-6 * counted.launches for card in CARDS)


def test_views_are_nothing_and_what_is_expanded_is_there_once() -> None:
    def make() -> Callable[[], Any]:
        x, row = torch.empty(4, 8, device=GPU), torch.empty(1, 8, device=GPU)
        return lambda: x.t().reshape(32)[None].unflatten(1, (8, 4)).transpose(1, 2) + row.expand(4, 8)

    counted = _counted(make).count
    assert counted.names == {"clone": 1, "add": 1}
    assert counted.moved == {"copies": 2 * 4 * 32, "elementwise": 4 * (32 + 8 + 32)}


def test_what_is_kept_twice_counts_once_and_weights_do_not() -> None:
    def make() -> Callable[[], Any]:
        x = torch.empty(4, 8, device=GPU).requires_grad_()
        weights.append(x)

        def call() -> None:
            with keeping(found, weights):
                made = (x * x).exp()
                (made * made).sum()

        return call

    weights: list[Tensor] = []
    found = Meter()
    with pretended(found):
        call = make()
        found.on = True
        call()
    assert found.count.kept == 4 * 32, "what exp gave, for its own gradient and twice for the product's"


def test_attention_takes_the_kernels_of_a_gpu_and_norms_are_one_operation() -> None:
    def make() -> Callable[[], Any]:
        q = torch.empty(1, 2, 16, 64, device=GPU, dtype=torch.bfloat16)
        mask = torch.ones(1, 1, 1, 16, dtype=torch.bool, device=GPU)
        weight = torch.empty(64, device=GPU, dtype=torch.bfloat16)

        def call() -> None:
            F.scaled_dot_product_attention(q, q, q)
            F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
            F.rms_norm(q, (64,), weight)

        return call

    counted = _counted(make).count
    assert counted.operations["attention"] == 2
    assert counted.names["_scaled_dot_product_flash_attention"] == 1
    assert counted.operations["norms"] == 1
    assert counted.operations["gemm"] == 0


def test_a_number_that_is_read_back_is_a_wait() -> None:
    def make() -> Callable[[], Any]:
        x = torch.empty(4, device=GPU)
        return lambda: (
            x.sum().item(),
            x.cpu(),
            bool(x.isfinite().all()),
            torch.ones(2).sum().item(),
            torch.cuda.synchronize(),
        )

    assert _counted(make).count.waits == 4, "the host's own numbers are no wait"


def test_the_backward_pass_is_that_of_the_engine() -> None:
    """The same gradients on real numbers: shared weights, several outputs, recomputed blocks, casts, functions of Python."""

    def gradients(go: Callable[[Tensor], None]) -> list[Tensor]:
        torch.manual_seed(0)
        shared, norm = nn.Linear(8, 8), nn.LayerNorm(8)
        x = torch.randn(4, 8)
        left, right = shared(norm(shared(x))).chunk(2, dim=1)
        half = checkpoint(lambda y: norm(y).tanh() @ y.t(), torch.cat([left, right * left], dim=1), use_reentrant=False)
        wide = _Twice.apply(half.bfloat16(), 3.0, shared.weight).float() + shared.bias[:4]
        go((wide * left.sum(1, keepdim=True)).mean())
        return [parameter.grad for parameter in (*shared.parameters(), *norm.parameters())]

    expected = gradients(lambda loss: loss.backward())
    for own, wanted in zip(gradients(backward), expected, strict=True):
        torch.testing.assert_close(own, wanted)
