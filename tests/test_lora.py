"""Our LoRA layers are those of peft: the same answers and gradients, with fewer operations."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from runner.networks.lora import FirstProduct, LoraLinear, wrapped
from runner.networks.narrow import NarrowFactors, _Narrow
from tests.inprocess import trained_bytes
from tests.ready import ready
from tests.support import Place

BASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 8), (2, 5, 6)),
    "one row an item": (lambda: nn.Linear(6, 8, bias=False), (3, 6)),
    "linear of a video": (lambda: nn.Linear(6, 8), (2, 3, 4, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 7)),
    "conv of a video": (lambda: nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1)), (2, 4, 3, 5, 5)),
}
DTYPES = {
    "fp32": (torch.float32, None, 1e-5),
    "fp32 weights under autocast": (torch.float32, torch.bfloat16, 0.03),
    "bf16 under autocast": (torch.bfloat16, torch.bfloat16, 0.03),
    "bf16 as it is": (torch.bfloat16, None, 0.03),
}


def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """Ours and peft's, with the same numbers; s = 3 / 2."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(BASES[name][0]())
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        state = {key: tensor.clone() for key, tensor in model[0].state_dict().items()}
        theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"]), model)[0]
        base = BASES[name][0]().requires_grad_(False)
        base.load_state_dict(state)
        ours = wrapped(base.to(dtype), 2, 1.5)
        theirs.base_layer.to(dtype)
        with torch.no_grad():
            for part in ("lora_A", "lora_B"):
                drawn = torch.randn(getattr(ours, part).shape)
                getattr(ours, part).copy_(drawn)
                getattr(theirs, part)["default"].weight.copy_(drawn)
    return ours, theirs


def gradients(layer: nn.Module, x: Tensor, parts: Sequence[nn.Parameter], narrow: torch.dtype | None) -> list[Tensor]:
    """The answer, and the gradients of x, A and B."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=narrow) if narrow is not None else nullcontext():
        answer = layer(x)
    probe = torch.linspace(-1, 1, answer.numel()).view(answer.shape)
    (answer.float() * probe).sum().backward()
    return [answer.detach().float(), x.grad.float(), *(part.grad for part in parts)]  # type: ignore[union-attr, list-item]


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", BASES)
def test_answers_and_gradients_are_those_of_peft(name: str, precision: str) -> None:
    dtype, narrow, allowed = DTYPES[precision]
    ours, theirs = pair(name, dtype)
    x = torch.randn(BASES[name][1], generator=torch.Generator().manual_seed(1)).to(dtype)
    parts = [getattr(theirs, part)["default"].weight for part in ("lora_A", "lora_B")]
    expected = gradients(theirs, x, parts, narrow)
    for found, wanted in zip(gradients(ours, x, [ours.lora_A, ours.lora_B], narrow), expected, strict=True):
        scale = wanted.abs().max().clamp(min=1)
        torch.testing.assert_close(found / scale, wanted / scale, rtol=allowed, atol=allowed)


class Counting(TorchDispatchMode):
    """Counts what is asked of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def counted(layer: nn.Module, x: Tensor) -> Counter[str]:
    with Counting() as mode, torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    return mode.counts


def test_casts_are_of_both_halves_alone() -> None:
    """A bf16 layer with an input in bf16: peft widens the input and autocast narrows it again."""
    ours, theirs = pair("linear", torch.bfloat16)
    x = torch.randn(2, 5, 6, dtype=torch.bfloat16)
    assert counted(ours, x)["_to_copy"] == 2
    assert counted(theirs, x)["_to_copy"] == 4
    assert not {"mul", "add"} & set(counted(ours, x)), "the scale and the sum are in the second product"


def tied() -> list[LoraLinear]:
    """q, k and v with one first factor."""
    product, layers = FirstProduct(), []
    for number in range(3):
        layer = LoraLinear(nn.Linear(6, 8).requires_grad_(False), 2, 1.0)
        layer.lora_B = nn.Parameter(torch.full((8, 2), number + 1.0))
        layers.append(layer)
    with torch.no_grad():
        layers[0].lora_A.normal_()
    for layer in layers:
        layer.lora_A, layer.shared = layers[0].lora_A, product
        product.layers += 1
    return layers


def alone(layer: LoraLinear, x: Tensor) -> Tensor:
    product, layer.shared = layer.shared, None
    try:
        answer: Tensor = layer(x)
    finally:
        layer.shared = product
    return answer


def test_a_shared_first_product_is_made_once() -> None:
    layers, x = tied(), torch.randn(2, 5, 6)
    made: list[int] = []
    first = LoraLinear.first
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoraLinear, "first", lambda self, x: (made.append(1), first(self, x))[1])
        together = [layer(x) for layer in layers]
        assert len(made) == 1
        [layer(torch.randn(2, 5, 6)) for layer in layers]
        assert len(made) == 4, "of an input of its own each"
    torch.stack(together).sum().backward()
    shared = layers[0].lora_A.grad.clone()  # type: ignore[union-attr]
    layers[0].lora_A.grad = None
    for layer, answer in zip(layers, together, strict=True):
        separate = alone(layer, x)
        torch.testing.assert_close(separate, answer)
        separate.sum().backward()
    torch.testing.assert_close(layers[0].lora_A.grad, shared)


def test_a_product_is_never_stale() -> None:
    """Some of the layers were called, then the factor, the input or the mode is another one."""
    layers, x = tied(), torch.randn(2, 5, 6)
    layers[0](x)
    with torch.no_grad():
        layers[0].lora_A.add_(1)
    torch.testing.assert_close(layers[1](x), alone(layers[1], x))
    x.add_(1)
    torch.testing.assert_close(layers[2](x), alone(layers[2], x))
    with torch.no_grad():
        layers[0](x)
    assert layers[1](x).requires_grad
    product = layers[0].shared
    assert product is not None
    [layer(x.clone()) for layer in layers for _ in range(3)]
    kept = x.clone()
    [layer(kept) for layer in layers]
    assert product._made is None, "nothing is kept after the last of them"


def test_factors_are_narrowed_together(family_place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same bytes as each by itself; a step casts once each way."""
    place = family_place("sdxl")
    changes = {
        "network": {"conv_rank": 2},
        "training": {
            "max_train_steps": 2,
            "mixed_precision": "bf16",
            "gradient_accumulation_steps": 2,
            "components": {"text_encoder_1": True},
            "memory": {"gradient_checkpointing": True},
        },
    }
    casts: list[int] = []
    narrow = _Narrow.forward
    monkeypatch.setattr(_Narrow, "forward", staticmethod(lambda *given: (casts.append(1), narrow(*given))[1]))
    together = trained_bytes(place.write(changes))
    assert len(casts) == 4, "one a batch"
    shutil.rmtree(place.folder / ".runner" / "artifacts")
    monkeypatch.setattr(NarrowFactors, "refresh", lambda self: None)
    assert trained_bytes(place.file) == together


def test_a_step_ends_what_was_narrowed(family_place: Callable[..., Place]) -> None:
    """Samples and scores between two steps are made with the weights as they are then."""
    place = family_place("sd15")
    place.write({"training": {"mixed_precision": "bf16"}})
    task, loader = ready(place, torch.device("cpu")).task()
    (batch, *_) = next(loader.steps_from(0))
    task.loss(batch).backward()
    assert all(layer.narrow is not None for layer in task.narrow.layers)
    task.stepped()
    assert [layer for layer in task.narrow.layers if layer.narrow is not None] == []


def test_narrow_factors_follow_the_weights() -> None:
    layer = LoraLinear(nn.Linear(6, 8).requires_grad_(False), 2, 1.0)
    unused = LoraLinear(nn.Linear(6, 8).requires_grad_(False), 2, 1.0)
    factors = NarrowFactors([nn.Sequential(layer, unused)])
    x = torch.randn(2, 5, 6)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            factors.refresh()
            assert layer.narrow is not None
            torch.testing.assert_close(layer.narrow[1], layer.lora_B.bfloat16())
            layer(x).float().sum().backward()
        assert layer.lora_B.grad is not None
        assert unused.lora_B.grad is None, "it took no part"
        with torch.no_grad():
            layer.lora_B.add_(1)
        factors.clear()
        assert layer.narrow is None
    layer.lora_A.data = torch.ones(2, 6)  # a state that was read, for instance
    with torch.autocast("cpu", dtype=torch.bfloat16):
        factors.refresh()
    assert layer.narrow is not None
    assert layer.narrow[0] is not None
    assert bool((layer.narrow[0] == 1).all())
