"""A device that Python cannot look into: each family trains a step, scores and samples on PyTorch's meta device, where a
tensor left on the host or a hidden wait (`.item()`, `bool()`, `.tolist()`) raises. And what is kept off the device is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from runner.core.task import Batch, moved
from runner.families.registry import FAMILIES, family
from runner.inputs.select import SelectInputs
from runner.optim.build import build_optimizer
from runner.optim.single import SingleOptimizers, SingleOptions
from runner.stages.pictures import make_latents
from schemas.training import Optimizer
from tests.ready import ready
from tests.support import Place

META = torch.device("meta")
Make = Callable[..., Place]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_forward_pass_waits_for_the_device(family_place: Make, name: str, split: bool) -> None:
    video = family(name).spec.clips is not None
    if split and not video:
        pytest.skip("its text has one length")
    place = family_place(name)
    (place.folder / "pics" / "0.txt").write_text("a much longer caption than the others have, of many more words")
    place.write({"model": {"split_attention": True}} if split else {})
    made = ready(place, META)
    task, loader = made.task()
    unequal = masked = False
    for batches in (next(loader.steps_from(step)) for step in range(5)):
        for batch in batches:
            mask = batch.tensors.get("cond.mask")
            masked |= mask is not None
            unequal |= mask is not None and len(set(mask.sum(1).tolist())) > 1
            loss = task.loss(batch)
            loss.backward()
            assert loss.device == META
            assert all(tensor.device == META or key == "cond.mask" for key, tensor in batch.tensors.items())
    assert unequal == masked, "a batch of texts of several lengths was among them"
    for prompt in made.run.prompts:
        latents = make_latents(made.context, made.trained.modules, replace(prompt, seed=1), made.encoded)
        assert latents.device == META


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_read_once_a_measurement(family_place: Make, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the errors themselves come back from the device."""
    place = family_place(name)
    made = ready(place, META)
    read: list[tuple[int, ...]] = []

    def cpu(self: torch.Tensor) -> torch.Tensor:
        read.append(tuple(self.shape))
        return torch.zeros(self.shape)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    rows = made.scorer._measure(made.graph.of(SelectInputs).held_out, made.trained.modules, None)
    assert len(rows) == len(made.graph.of(SelectInputs).held_out) == 2
    assert sum(shape[0] for shape in read) == 2 * 8


def test_states_of_an_offloaded_optimizer_wait_on_the_host() -> None:
    """On a pretended GPU: between steps the states are on the host, in a step on the device."""
    with FakeTensorMode():
        for offload in (False, True):
            weights = [nn.Parameter(torch.ones(64, 64, device="cuda:0")) for _ in range(2)]
            groups = [{"params": weights, "lr": 1e-3, "name": "denoiser"}]
            options = SingleOptions(offload=offload, fused_backward=not offload)
            optimizer = build_optimizer(Optimizer(args={"fused": False, "foreach": False}), groups, options)
            assert isinstance(optimizer, SingleOptimizers)
            for _ in range(2):
                for weight in weights:
                    weight.grad = torch.ones_like(weight)
                for index in range(2):
                    optimizer._step_one(index)
                where = {
                    value.device.type
                    for single in optimizer.singles
                    for entry in single.state.values()
                    for name, value in entry.items()
                    if name != "step"
                }
                assert where == ({"cpu"} if offload else {"cuda"})


def test_conditioning_that_python_reads_stays_on_the_host() -> None:
    tensors = {"mask": torch.ones(1, 4), "text": torch.ones(1, 4, 2)}
    assert {name: tensor.device.type for name, tensor in moved(tensors, META).items()} == {
        "mask": "cpu",
        "text": "meta",
    }
    batch = Batch(
        step=0, names=("a",), share=1.0, tensors={"cond.mask": torch.ones(1, 4), "mask": torch.ones(1, 1, 4, 4)}
    )
    found = {name: tensor.device.type for name, tensor in batch.to(META).tensors.items()}
    assert found == {"cond.mask": "cpu", "mask": "meta"}, "the mask of a masked loss is a picture, and goes"
