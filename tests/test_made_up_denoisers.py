"""The made-up family's two denoisers: which one is asked, that both are trained, measured, saved and counted."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from runner.core.task import Batch
from runner.errors import InvalidConfig
from runner.execute.export import Exporter, plain_states, whole_model
from runner.families.contract import LoadOptions
from runner.families.parts.files import CONFIGS
from runner.families.registry import family
from runner.families.sd.spec import SD15_FINDER
from runner.formats.adapter_read import read_lora
from runner.inputs.select import SelectInputs
from runner.inputs.train import TrainInputs
from runner.model.model import Denoiser
from runner.networks.merge import merge_into
from runner.networks.quantize import QuantizedLinear
from runner.plan.estimate import figures, memory_question
from runner.plan.render import plan_record, render_plan
from runner.stages.checkpoints import Checkpoints
from runner.stages.denoising import Denoisers
from runner.stages.modules import build, swap_blocks
from runner.stages.pictures import make_latents
from tests.inprocess import Verbs, applied, planned, prepared, stopped_anew, trained_bytes, verb  # noqa: F401
from tests.ready import Ready, ready
from tests.support import Place, merged
from tests.test_made_up_family import installed  # noqa: F401

BOTH = ("denoiser", "denoiser_2")
CPU = torch.device("cpu")
OPTIONS = LoadOptions(dtype=torch.float32, device=CPU)
FOUR_STEPS = {"max_train_steps": 4, "checkpoints": {"every_n_steps": 4, "state_every_n_steps": 1}}
WHOLE: dict[str, Any] = {"network": None}


@pytest.fixture
def two(place: Place, installed: None) -> Place:  # noqa: F811
    """A run of the family on its tiny model."""
    shutil.rmtree(place.folder / "model")
    family("made_up").tiny(place.folder / "model")
    place.base = {"model": {"family": "made_up"}, "training": FOUR_STEPS}
    place.write()
    return place


def of(component: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.split(".")[0] == component}


@contextmanager
def asked(made: Ready) -> Iterator[list[tuple[str, list[float]]]]:
    """(denoiser, the timesteps that it is told) of each call."""
    seen: list[tuple[str, list[float]]] = []
    modules: list[Any] = [made.trained.modules[name] for name in BOTH]
    hooks = [
        module.register_forward_pre_hook(lambda _, given, own=name: seen.append((own, given[1].reshape(-1).tolist())))
        for name, module in zip(BOTH, modules, strict=True)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def at(batch: Batch, timesteps: Sequence[int]) -> Batch:
    """The same batch with these timesteps."""
    tensors = {**batch.tensors, "timesteps": torch.tensor(timesteps)}
    return replace(batch, tensors=tensors, timesteps=tuple(map(float, timesteps)))


def test_the_boundary_decides_which_denoiser_learns(two: Place) -> None:
    made = ready(two, CPU)
    task, loader = made.task()
    batch = next(loader.steps_from(0))[0]
    assert batch.timesteps == tuple(batch.tensors["timesteps"].tolist())
    sides: list[tuple[list[int], list[tuple[str, list[float]]]]] = [
        ([500, 999], [("denoiser", [500, 999])]),
        ([0, 499], [("denoiser_2", [0, 499])]),
        ([700, 3], [("denoiser", [700]), ("denoiser_2", [3])]),
    ]
    for timesteps, calls in sides:
        for parameter in task.parameters.values():
            parameter.grad = None
        with asked(made) as seen:
            task.loss(at(batch, timesteps)).backward()
        assert seen == calls
        learning = {name.split(".")[0] for name, parameter in task.parameters.items() if parameter.grad is not None}
        assert learning == {name for name, _ in calls}


def test_a_batch_on_both_sides_is_its_halves(two: Place) -> None:
    made = ready(two, CPU)
    answer = Denoisers(made.context.family, made.run.model, made.trained.modules)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 4, 16, 16, generator=generator)
    hidden = torch.randn(4, 77, 16, generator=generator)
    t = torch.tensor([900, 10, 499, 500])
    told = {"hidden": hidden, "brightness": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    found = answer(x, t, t.tolist(), told)
    for name, places in (("denoiser", [0, 3]), ("denoiser_2", [1, 2])):
        module = made.trained.modules[name]
        alone = made.context.family.denoise(
            module, x[places], t[places], {key: own[places] for key, own in told.items()}
        )
        assert torch.equal(found[places], alone), name
    other = answer(x, t, [900, 500, 499, 10], told)
    assert [torch.equal(one, two) for one, two in zip(found, other, strict=True)] == [True, False, True, False]


def test_the_choice_waits_for_no_device(two: Place) -> None:
    """On PyTorch's meta device, which Python cannot look into."""
    made = ready(two, torch.device("meta"))
    task, loader = made.task()
    loss = task.loss(at(next(loader.steps_from(0))[0], [700, 3]))
    loss.backward()
    assert loss.device.type == "meta"
    latents = make_latents(made.context, made.trained.modules, replace(made.run.prompts[0], seed=1), made.encoded)
    assert latents.device.type == "meta"


def test_both_are_trained_and_resumed_to_the_byte(two: Place) -> None:
    calm = trained_bytes(two.file)
    fresh = ready(two, CPU).trained.parameters
    for name in BOTH:
        own = of(name, load(calm))
        assert own, name
        assert any(not torch.equal(tensor, fresh[key]) for key, tensor in own.items()), name
    stopped_anew(two, 1)
    assert trained_bytes(two.file) == calm


def test_a_denoiser_that_had_no_turn_is_resumed_too(two: Place) -> None:
    """All timesteps are on one side: the other denoiser has no optimizer state, and stays as it was."""
    two.base = merged(two.base, {"training": {"timesteps": {"min": 500}, "ema": {"decay": 0.5}}})
    two.write()
    calm = trained_bytes(two.file)
    fresh = ready(two, CPU).trained.parameters
    changed = {key for key, tensor in load(calm).items() if not torch.equal(tensor, fresh[key])}
    assert {key.split(".")[0] for key in changed} == {"denoiser"}
    stopped_anew(two, 1)
    assert trained_bytes(two.file) == calm


def test_one_switch_is_for_both(two: Place) -> None:
    two.write({"training": {"components": {"denoiser": False, "text_encoder_1": True}}})
    assert {target.component for target in prepared(two.file).targets} == {"text_encoder_1"}
    two.write({"training": {"components": {"denoiser": 1e-5}}})
    run = prepared(two.file)
    assert {target.component for target in run.targets} == set(BOTH)
    assert run.model.rates(run.config.training.components.rates) == dict.fromkeys(BOTH, 1e-5)


def test_samples_ask_each_denoiser_for_its_steps(two: Place) -> None:
    made = ready(two, CPU)
    prompt = replace(made.run.prompts[0], seed=1, num_inference_steps=8)
    with asked(made) as seen:
        latents = make_latents(made.context, made.trained.modules, prompt, made.encoded)
    assert [name for name, _ in seen] == ["denoiser"] * 4 + ["denoiser_2"] * 4
    assert all((t >= 500) == (name == "denoiser") for name, told in seen for t in told)
    for name in BOTH:
        with disturbed(made, name):
            assert not torch.equal(make_latents(made.context, made.trained.modules, prompt, made.encoded), latents)


@contextmanager
def disturbed(made: Ready, name: str) -> Iterator[None]:
    """With one denoiser's last layer doubled."""
    weight = made.trained.modules[name].conv_out.weight
    with torch.no_grad():
        weight.mul_(2)
        yield
        weight.div_(2)


def test_scores_ask_each_denoiser_for_its_levels(two: Place) -> None:
    made = ready(two, CPU)
    items = made.graph.of(SelectInputs).held_out
    before = made.scorer._measure(items, made.trained.modules, None)
    for name, own in (("denoiser", [4, 5, 6, 7]), ("denoiser_2", [0, 1, 2, 3])):
        with disturbed(made, name):
            after = made.scorer._measure(items, made.trained.modules, None)
        assert [place for place in range(8) if before[0][place] != after[0][place]] == own


def test_another_boundary_is_another_training(two: Place) -> None:
    outcome = applied(two.file)
    assert outcome.published
    plan = planned(two.file, "model.boundary=300")
    reasons = ["model.boundary 500 → 300"]
    assert (plan.actions["train"].reasons, plan.actions["train"].symbol) == (reasons, "-/+")
    assert plan.actions["cache.latents"].symbol == plan.actions["cache.text"].symbol == "="
    base = {step: planned(two.file, step).graph.of(SelectInputs).score_key(0, "raw") for step in BOUNDARIES}
    assert len(set(base.values())) == 2, "the base model's scores are others too"


BOUNDARIES = ("model.boundary=300", "model.boundary=500")


def test_the_plan_says_which_there_are(two: Place) -> None:
    plan = planned(two.file, "model.boundary=875")
    numbers = figures(plan, None)
    lines = render_plan(plan, numbers).splitlines()
    assert "  denoisers    denoiser_2 for timesteps below 875, denoiser from 875 on" in lines
    assert plan_record(plan, numbers)["figures"]["denoisers"] == [
        {"component": "denoiser_2", "from_timestep": 0.0, "below_timestep": 875},
        {"component": "denoiser", "from_timestep": 875, "below_timestep": None},
    ]
    assert ("model.boundary", 500) in [(item.key, item.value) for item in planned(two.file).prepared.derived]
    two.write({"model": {"family": "sd15"}})
    plain = planned(two.file)
    assert "denoisers" not in render_plan(plain, figures(plain, None))
    assert "denoisers" not in plan_record(plain, figures(plain, None))["figures"]


def test_memory_and_disk_count_both(two: Place) -> None:
    plan = planned(two.file)
    spec, model = plan.prepared.spec, plan.prepared.model
    asked_for = memory_question(plan, 1000, "cuda")
    alone = replace(model, denoisers=(Denoiser("denoiser"),))
    own = [component.parameters for name, component in model.components.items() if name in BOTH]
    assert own[0] == own[1] > 0
    for phase in ("train", "sample", "select"):
        both = spec.memory(asked_for).phases[phase]
        assert both - spec.memory(replace(asked_for, model=alone)).phases[phase] == own[1] * asked_for.frozen_bytes
    whole = replace(asked_for, trains=dict.fromkeys(BOTH, True), trainable=sum(own), targets={})
    once = replace(whole, trains={"denoiser": True}, trainable=own[0], model=alone)
    grown = spec.memory(whole).phases["train"] - spec.memory(once).phases["train"]
    assert grown == pytest.approx(own[1] * (4 + 4 + asked_for.optimizer_bytes), rel=0.01), "weights, gradients, states"
    swapped = replace(asked_for, blocks_to_swap=3)
    saved = spec.memory(asked_for).phases["train"] - spec.memory(swapped).phases["train"]
    saved_alone = (
        spec.memory(replace(asked_for, model=alone)).phases["train"]
        - spec.memory(replace(swapped, model=alone)).phases["train"]
    )
    assert saved > saved_alone + own[1], "one of them waits on the host"
    two.write(WHOLE)
    assert figures(planned(two.file), None).trainable == sum(own)


def test_one_waits_on_the_host_while_the_other_computes(two: Place) -> None:
    made = ready(two, CPU)
    task, loader = made.task()
    batch = at(next(loader.steps_from(0))[0], [700, 3])
    task.train_mode(False)
    losses = [task.loss(batch)]
    total, largest = made.run.spec.count_blocks(made.run.model)
    assert total == 2 * largest
    swap_blocks(made.context, made.trained, 1)
    swap = made.trained.swap
    assert swap is not None
    assert (len(swap.blocks), swap.room) == (total, largest - 1)
    loss = task.loss(batch)
    loss.backward()
    assert swap.loads > total
    losses.append(loss)
    assert torch.equal(*losses)


def states(place: Place) -> dict[str, dict[str, Tensor]]:
    """The two denoisers of what run.toml names."""
    run = prepared(place.file)
    modules = {name: family("made_up").load(run.model, name, OPTIONS) for name in BOTH}
    return {name: dict(module.state_dict()) for name, module in modules.items()}


def exporter(place: Place) -> tuple[Exporter, Callable[[], dict[str, dict[str, Tensor]]]]:
    """What writes the run's exports, and the two denoisers as they are trained."""
    applied(place.file, until="train")
    made = ready(place, CPU)
    node = made.graph.node(TrainInputs)
    folder = made.run.store.artifact("train", node.fingerprint) / "checkpoints"
    checkpoints, train = Checkpoints(folder), made.graph.of(TrainInputs)

    def expected() -> dict[str, dict[str, Tensor]]:
        state = checkpoints.load(4, "raw")
        trained = build(made.context, train, None)
        if train.targets is None:
            trained.assign(state)
        return whole_model(made.context, trained.modules, train, state, torch.float32, BOTH)

    return Exporter(made.context, made.run, train, checkpoints, node.fingerprint), expected


def differing(one: dict[str, dict[str, Tensor]], other: dict[str, dict[str, Tensor]]) -> set[str]:
    return {
        name
        for name in BOTH
        if any(not torch.allclose(one[name][key], x, rtol=0, atol=1e-6) for key, x in other[name].items())
    }


@pytest.mark.parametrize("form", ["kohya", "diffusers", "comfyui"])
def test_adapters_of_both_are_read_from_a_file(two: Place, form: str) -> None:
    made, expected = exporter(two)
    base, file = states(two), two.folder / "both.safetensors"
    shutil.copyfile(made.export(4, "raw", form, "fp32"), file)
    merged_file = merged_with(two, file)
    assert differing(merged_file, expected()) == set()
    assert differing(merged_file, base) == set(BOTH)
    two.write({"network": {"init_from": str(file)}})
    start = build_from(two)
    trained = made.checkpoints.load(4, "raw")
    assert set(start) == set(trained)
    assert all(torch.allclose(start[name], tensor, atol=1e-6) for name, tensor in trained.items())
    two.write({"network": {"base_weights": [str(file)]}})
    modules = ready(two, CPU).trained.modules
    assert differing(plain_states(modules), expected()) == set()


def merged_with(place: Place, file: Path) -> dict[str, dict[str, Tensor]]:
    run = prepared(place.file)
    modules = {name: family("made_up").load(run.model, name, OPTIONS) for name in BOTH}
    merge_into(modules, read_lora(file, run.spec.layers(run.model), 1.0).changes)
    return {name: dict(module.state_dict()) for name, module in modules.items()}


def build_from(place: Place) -> dict[str, Tensor]:
    made = ready(place, CPU)
    trained = build(made.context, made.graph.of(TrainInputs), made.run.init_from)
    return {name: parameter.detach() for name, parameter in trained.parameters.items()}


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("form", ["single_file", "diffusers", "comfyui"])
def test_whole_models_are_read_again(two: Place, form: str, method: str) -> None:
    if method == "lora" and form != "single_file":
        return  # an adapter's file: above
    two.base = merged(two.base, WHOLE if method == "full" else {})
    two.write()
    base = states(two)
    made, expected = exporter(two)
    wanted, found = expected(), made.export(4, "raw", form, "fp32")
    assert differing(wanted, base) == set(BOTH)
    named = {"checkpoint": str(found)}
    if form == "comfyui":
        assert sorted(file.name for file in found.iterdir()) == [f"{name}.safetensors" for name in BOTH]
        shutil.copytree(two.folder / "model", two.folder / "other")
        unet = two.folder / "other" / "unet"
        named = {"checkpoint": "other", "low_noise": str(found / "denoiser_2.safetensors")}
        shutil.rmtree(two.folder / "other" / "unet_2")
        assert set(load_file(found / "denoiser.safetensors")) == set(load_file(found / "denoiser_2.safetensors"))
        module: Any = family("made_up").load(prepared(two.file).model, "denoiser", OPTIONS)
        module.load_state_dict(wanted["denoiser"])
        module.save_pretrained(unet)
    two.write({"model": named})
    with tiny_shipped(two):
        assert differing(states(two), wanted) == set()


@contextmanager
def tiny_shipped(place: Place) -> Iterator[None]:
    """A file brings no configurations: those of the tiny model stand for the shipped ones."""
    finders = [resolve_name("made_up_family.spec:FINDER"), SD15_FINDER]
    for finder in finders:
        object.__setattr__(finder, "shipped", place.folder / "model")
    yield
    for finder in finders:
        object.__setattr__(finder, "shipped", CONFIGS / "sd15")


def test_a_second_denoiser_is_named_apart(two: Place, verb: Verbs) -> None:  # noqa: F811
    (two.folder / "model" / "unet_2").rename(two.folder / "low")
    with pytest.raises(InvalidConfig) as caught:
        prepared(two.file)
    (finding,) = caught.value.diagnostics
    assert "unet_2/config.json is missing" in finding.message
    assert finding.hint == "name it with model.low_noise"
    two.base = merged(two.base, {"model": {"low_noise": "low"}})
    two.write()
    applied(two.file, until="train")
    weights = two.folder / "low" / "diffusion_pytorch_model.safetensors"
    changed = load_file(weights)
    changed["conv_out.bias"] += 1
    save_file(changed, weights, {"format": "pt"})
    assert planned(two.file).actions["train"].reasons == ["model.low_noise: its content changed"]
    two.write({"model": {"family": "sd15"}})
    with pytest.raises(InvalidConfig, match=r"family sd15 cannot use `model\.low_noise`: it belongs to Made-up"):
        prepared(two.file)


def test_both_are_packed(two: Place) -> None:
    two.write({"model": {"quantization": "int8"}})
    made = ready(two, CPU)
    for name in BOTH:
        assert any(isinstance(module, QuantizedLinear) for module in made.trained.modules[name].modules())


def test_a_lora_is_merged_into_both_for_samples(two: Place, verb: Verbs) -> None:  # noqa: F811
    applied(two.file)
    best = two.output / "best.safetensors"
    assert {key.partition("_down_blocks")[0] for key in load_file(best) if "_down_blocks" in key} >= {
        "lora_unet",
        "lora_unet_2",
    }
    shown = verb(
        two, "sample", "run.toml", "--checkpoint", "base", "--lora", str(best), "--save-merged", "m.safetensors"
    )
    shown.ok()
    merged_file = load_file(two.folder / "m.safetensors")
    assert len([key for key in merged_file if key.startswith("low_noise_model.")]) == len(
        [key for key in merged_file if key.startswith("model.diffusion_model.")]
    )
