"""What a denoiser is told in numbers — timesteps, guidance, sizes — reaches its sinusoids unrounded, bf16 weights or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import Timesteps
from PIL import Image
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from runner.core.precision import autocast
from runner.families.contract import LoadOptions, Shown
from runner.families.registry import family, family_spec
from runner.inputs.train import TrainInputs
from runner.plan.compile import compile_graph
from tests.inprocess import applied, prepared
from tests.support import Place

EXACT = 937.203125
"""Not a number of bf16, which has 936 and 940."""


@pytest.fixture
def told() -> Iterator[list[Tensor]]:
    """What every embedding of a number was given."""
    found: list[Tensor] = []

    def note(module: Any, arguments: tuple[Any, ...]) -> None:
        if isinstance(module, Timesteps):
            found.append(arguments[0].detach().double().flatten())

    handle = register_module_forward_pre_hook(note)
    yield found
    handle.remove()


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "hunyuan_video"])
def test_numbers_are_told_in_full(family_place: Callable[..., Place], told: list[Tensor], name: str) -> None:
    run = prepared(family_place(name, model={"dtype": "bf16"}).file)
    cpu = torch.device("cpu")
    denoiser = family(name).load(run.model, "denoiser", LoadOptions(dtype=torch.bfloat16, device=cpu))
    model, video = run.model, name == "hunyuan_video"
    conditioning = {
        "hidden": torch.zeros(1, 7, model.text_width),
        "text": torch.zeros(1, 9, model.text_width),
        "mask": torch.ones(1, 9),
        "pooled": torch.zeros(1, model.text_extra - {"sdxl": 6, "hunyuan_video": 256}.get(name, 0)),
        "guidance": torch.tensor([6017.0]),
    }
    shown = Shown(original=(1365, 767), corner=(3, 5), size=(1025, 515), guidance=None, own=None)
    sizes = family(name).told(shown, {})
    wanted = {EXACT} | ({6017.0} if video else set())
    if sizes:
        conditioning["time_ids"] = sizes["time_ids"][None]
        wanted |= {1365.0, 767.0, 3.0, 5.0, 1025.0, 515.0}
    else:
        del conditioning["pooled" if name == "sd15" else "guidance" if not video else "hidden"]
    shape = (1, model.latent_channels, *([1] if video else []), 8, 8)
    with torch.no_grad(), autocast("bf16", cpu):
        family(name).denoise(denoiser, torch.zeros(shape), torch.tensor([EXACT]), conditioning)
    assert {float(value) for values in told for value in values} == wanted


def test_sizes_are_told_in_full_while_training_scoring_and_sampling(
    family_place: Callable[..., Place], told: list[Tensor]
) -> None:
    place = family_place("sdxl", model={"dtype": "bf16"}, training={"max_train_steps": 2})
    for index in range(10):
        Image.new("RGB", (1365, 1029), (20 * index, 9, 9)).save(place.folder / "pics" / f"{index}.png")
    applied(place.file, "sampling.width=24", "sampling.height=24", until="train")
    training = {float(value) for values in told if values.numel() % 6 == 0 for value in values}
    assert {1365.0, 1029.0} <= training
    assert 1368.0 not in training
    told.clear()
    applied(place.file, "sampling.width=24", "sampling.height=24")
    assert {1365.0, 1029.0, 24.0} <= {float(value) for values in told for value in values}


def test_the_sizes_embedding_is_that_of_sd_scripts(family_place: Callable[..., Place]) -> None:
    """sd-scripts takes sines and cosines in fp32 and rounds them; a rounded size gives other ones."""
    run = prepared(family_place("sdxl").file)
    module: Any = family("sdxl").load(
        run.model, "denoiser", LoadOptions(dtype=torch.bfloat16, device=torch.device("cpu"))
    )
    width = run.model.components["denoiser"].config["addition_time_embed_dim"]
    size = torch.tensor([1365.0])
    frequencies = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(width // 2) / (width // 2))
    theirs = torch.cat([torch.cos(size * frequencies), torch.sin(size * frequencies)])
    torch.testing.assert_close(module.add_time_proj(size)[0], theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(module.add_time_proj(size.bfloat16().float())[0], theirs, atol=1e-2)


def test_earlier_work_of_sdxl_is_not_taken_for_it(family_place: Callable[..., Place]) -> None:
    numerics = compile_graph(prepared(family_place("sdxl").file)).of(TrainInputs).numerics
    assert numerics.values["version"] == family_spec("sdxl").version == 2
    assert compile_graph(prepared(family_place("sd15").file)).of(TrainInputs).numerics.values["version"] is None
