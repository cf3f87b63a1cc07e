"""What a switch of memory, speed or data does, seen from outside: "the same losses" would also be there if it did nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn

from runner.core.fit import Hooks, Loop, fit
from runner.core.precision import scaler
from runner.core.task import Batch
from runner.families.registry import FAMILIES, family
from tests.inprocess import applied, trained_bytes
from tests.ready import ready
from tests.support import Place, draw_pictures

Make = Callable[..., Place]


@contextmanager
def calls_of(owner: Any, name: str) -> Iterator[list[Any]]:
    """Counts the calls of a function of PyTorch, which still does what it does."""
    real, seen = getattr(owner, name), []

    def counted(*arguments: Any, **named: Any) -> Any:
        seen.append(arguments)
        return real(*arguments, **named)

    setattr(owner, name, counted)
    try:
        yield seen
    finally:
        setattr(owner, name, real)


@pytest.mark.parametrize("name", FAMILIES)
def test_eager_attention_never_calls_the_kernel(family_place: Make, name: str) -> None:
    """In no part of a model: denoiser, text and image encoders, autoencoder; and its losses are those of the kernel."""
    place = family_place(name)
    losses: dict[str, list[float]] = {}
    for attention, until in (("eager", None), ("sdpa", "train")):
        place.write({"model": {"attention": attention}, "training": {"max_train_steps": 1}, "run": {"name": attention}})
        with calls_of(torch.nn.functional, "scaled_dot_product_attention") as seen:
            applied(place.file, until=until)
        assert bool(seen) == (attention == "sdpa")
        losses[attention] = losses_of(place, attention)
        shutil.rmtree(place.folder / ".runner" / "artifacts")
    assert losses["eager"] == pytest.approx(losses["sdpa"], rel=1e-4)


def losses_of(place: Place, name: str) -> list[float]:
    """The losses that a run has logged."""
    lines = (place.folder / "runs" / name / "logs" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event["loss"] for event in map(json.loads, lines) if event["type"] == "step"]


def forwards_a_step(place: Place, blocks: Callable[[Any], list[nn.Module]]) -> list[int]:
    """How often each of some modules runs in one training step."""
    made = ready(place, torch.device("meta"))
    task, loader = made.task()
    chosen = blocks(made)
    counts = [0] * len(chosen)
    for index, block in enumerate(chosen):

        def count(*_: Any, own: int = index) -> None:
            counts[own] += 1

        block.register_forward_pre_hook(count)
    for batch in next(loader.steps_from(0)):
        task.loss(batch).backward()
    return counts


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointed_blocks_run_twice_a_step(family_place: Make, name: str) -> None:
    def blocks(made: Any) -> list[nn.Module]:
        names = family(name).spec.blocks(made.run.model, "denoiser")
        return [made.trained.modules["denoiser"].get_submodule(block) for block in names]

    for on in (False, True):
        place = family_place(name)
        place.write({"training": {"memory": {"gradient_checkpointing": on}}})
        counts = forwards_a_step(place, blocks)
        assert counts, name
        assert max(counts) == (2 if on else 1)
        # Some units of a U-Net are no checkpointed blocks: the lone down- and upsamplers.
        assert counts.count(max(counts)) >= 0.75 * len(counts), counts
        shutil.rmtree(place.folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_offloaded_activations_are_copies_on_the_host(family_place: Make, name: str) -> None:
    """What the backward pass reads is no tensor of the forward pass, but for the weights; the gradients stay the same."""
    gradients = []
    for offload in (False, True):
        place = family_place(name)
        place.write({"training": {"memory": {"activation_offload": offload}}, "dataset": {"batch_size": 1}})
        made = ready(place, torch.device("cpu"))
        task, loader = made.task()
        with calls_of(torch.autograd.graph.saved_tensors_hooks, "__init__") as seen:
            loss = task.loss(next(loader.steps_from(0))[0])
        packs = [arguments[1] for arguments in seen]
        assert bool(packs) == offload
        tensor = torch.randn(4, 4)
        for pack in packs:
            _, kept = pack(tensor)
            assert kept.data_ptr() != tensor.data_ptr()
            weight = next(iter(made.trained.modules["denoiser"].parameters()))
            assert pack(weight.detach())[1].data_ptr() == weight.data_ptr(), "weights stay where they are"
        loss.backward()
        gradients.append(
            [parameter.grad.clone() for parameter in task.parameters.values() if parameter.grad is not None]
        )
        shutil.rmtree(place.folder)
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)
    assert len(gradients[0]) > 4


@pytest.mark.parametrize(("accumulation", "sizes"), [(2, [[2, 2], [2, 1]]), (3, [[2, 2, 2], [1]])])
def test_accumulated_steps_are_the_mean_over_their_items(
    place: Place, accumulation: int, sizes: list[list[int]]
) -> None:
    """A bare loop over whole steps, each one batch of all its items, ends in the same weights: uneven micro-batches (2 and
    1) count by their items, and the tail of an epoch is a step of its own."""
    place.write(
        {
            "dataset": {"batch_size": 2, "held_out": {"count": 3}},
            "training": {
                "gradient_accumulation_steps": accumulation,
                "max_train_steps": 4,
                "learning_rate": 0.5,
                "max_grad_norm": 0.0,
                "optimizer": {"type": "torch.optim.SGD"},  # AdamW would hide a gradient of another scale
                "checkpoints": {"dtype": "fp32"},
            },
        }
    )
    made = ready(place, torch.device("cpu"))
    task, loader = made.task()
    found = [[len(batch.names) for batch in next(loader.steps_from(step))] for step in range(4)]
    assert found == [*sizes, *sizes]
    process = task.process
    weights = list(task.parameters.values())
    start = [parameter.detach().clone() for parameter in weights]
    optimizer = torch.optim.SGD(weights, lr=0.5)
    for step in range(4):
        parts = [batch.tensors for batch in next(loader.steps_from(step))]
        whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        noisy = process.noisy(whole["latents"], whole["noise"], whole["timesteps"])
        answer = task.denoisers.modules["denoiser"](
            noisy.x_t, whole["timesteps"], encoder_hidden_states=whole["cond.hidden"], return_dict=False
        )[0]
        loss = ((answer - noisy.target) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = load(trained_bytes(place.file))
    for key, parameter in task.parameters.items():
        torch.testing.assert_close(trained[key], parameter.detach(), rtol=1e-4, atol=1e-6)
    assert max(float((old - new.detach()).abs().max()) for old, new in zip(start, weights, strict=True)) > 1e-3


def test_the_weight_of_a_source_scales_its_loss(place: Place) -> None:
    """One source of two, weighted 0: its items give no gradient; of weight 2: twice the loss."""
    draw_pictures(place.folder / "more", 4, seed=9)
    found: dict[float, list[tuple[bool, float]]] = {}
    for weight in (1.0, 2.0, 0.25):
        place.write(
            {
                "dataset": {
                    "batch_size": 1,
                    "held_out": None,
                    "sources": [{"path": "pics"}, {"path": "more", "weight": weight}],
                }
            }
        )
        made = ready(place, torch.device("cpu"))
        task, loader = made.task()
        with torch.no_grad():
            found[weight] = [
                (batch.names[0].startswith("more/"), float(task.loss(batch)))
                for step in range(8)
                for batch in next(loader.steps_from(step))
            ]
    assert {extra for extra, _ in found[1.0]} == {True, False}
    for weight in (2.0, 0.25):
        for (extra, plain), (also, scaled) in zip(found[1.0], found[weight], strict=True):
            assert extra == also
            assert scaled == pytest.approx(plain * (weight if extra else 1.0), rel=1e-5)


class Overflowing:
    """A task whose gradient does not fit fp16's scaled range in one of its steps."""

    device = torch.device("cpu")

    def __init__(self, at: int) -> None:
        self.at = at
        self.parameters = {"denoiser.w": nn.Parameter(torch.ones(2))}
        self.seen: list[list[float]] = []

    def steps_from(self, step: int) -> Iterator[list[Batch]]:
        for number in count(step):
            yield [
                Batch(
                    step=number,
                    names=("a",),
                    share=1.0,
                    tensors={"x": torch.full((2,), 1e36 if number == self.at else 1.0)},
                )
            ]

    def loss(self, batch: Batch) -> Tensor:
        self.seen.append(self.parameters["denoiser.w"].tolist())
        return (self.parameters["denoiser.w"] * batch.tensors["x"]).mean()

    def train_mode(self, on: bool) -> None: ...

    def stepped(self) -> None: ...


def test_a_step_that_overflows_in_fp16_is_skipped() -> None:
    """The loop's own loss scaling: the weights stay, the scale goes down, and the next steps train."""
    task = Overflowing(at=1)
    scale = scaler("fp16", torch.device("cpu"))
    optimizer = torch.optim.SGD(list(task.parameters.values()), lr=0.5)
    before = scale.get_scale()
    hooks = Hooks(is_due=lambda step: False, after=lambda step, state: None, log=lambda step, line: None)
    fit(
        task,
        optimizer,
        scale,
        Loop(steps=3, seed=0, max_grad_norm=0.0, clip_grad="global", log_every=1, factor=lambda step: 1.0),
        hooks,
        None,
    )
    assert task.seen == [[1.0, 1.0], [0.75, 0.75], [0.75, 0.75]]
    assert task.parameters["denoiser.w"].tolist() == [0.5, 0.5]
    assert scale.get_scale() < before
    assert not scaler("bf16", torch.device("cpu")).is_enabled()
