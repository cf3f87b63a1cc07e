"""What every family must do, through its tiny(): the contract that stages rely on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from runner.config.schema import all_keys
from runner.dataset.encodings import still_view
from runner.errors import InvalidConfig
from runner.families.contract import LoadOptions
from runner.families.registry import FAMILIES, family, family_spec
from runner.inputs.train import TrainInputs
from runner.model.numerics import Numerics
from runner.plan.compile import compile_graph
from tests.inprocess import planned, prepared
from tests.support import Place, family_changes, new_place


@pytest.fixture(params=sorted(FAMILIES))
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A run of each family on its tiny model."""
    family(request.param).tiny(tmp_path / "model")
    place = new_place(tmp_path / "place", tmp_path / "model")
    place.base = family_changes(request.param)
    place.write()
    return place


def parts(place: Place) -> tuple[Any, Any, Numerics]:
    run = prepared(place.file)
    return run, family(run.config.model.family), compile_graph(run).of(TrainInputs).numerics


def text_encoders(run: Any, bundle: Any) -> dict[str, Any]:
    return {name: bundle.load(run.model, name, OPTIONS) for name in run.model.text_encoders}


OPTIONS = LoadOptions(dtype=torch.float32, device=torch.device("cpu"), attention="sdpa", scratch_seed=None)


def test_components_are_those_of_the_spec(tiny: Place) -> None:
    run, bundle, _ = parts(tiny)
    assert bundle.spec is family_spec(run.config.model.family)
    for name, component in run.model.components.items():
        module = bundle.load(run.model, name, OPTIONS)
        assert sum(parameter.numel() for parameter in module.parameters()) == component.parameters
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
        half = bundle.load(
            run.model,
            name,
            LoadOptions(dtype=torch.float16, device=torch.device("cpu"), attention="sdpa", scratch_seed=None),
        )
        assert next(half.parameters()).dtype == torch.float16


def test_what_a_family_refuses_are_keys_of_the_schema(tiny: Place) -> None:
    spec = prepared(tiny.file).spec
    for dotted in spec.refused_keys:
        kind = all_keys()[dotted].type_text
        found = {"text": "x", "an integer": 2, "a number": 0.5, "true or false": True}
        changes: Any = next((value for start, value in found.items() if kind.startswith(start)), None)
        if changes is None:
            changes = json.loads(kind.split(" | ")[-1])
        for part in reversed(dotted.split(".")):
            changes = {part: changes}
        tiny.write(changes)
        with pytest.raises(InvalidConfig) as caught:
            prepared(tiny.file)
        messages = [finding.message for finding in caught.value.diagnostics]
        assert any(f"family {spec.name} cannot use `{dotted}`" in message for message in messages), messages


def test_a_picture_goes_in_and_comes_out(tiny: Place) -> None:
    run, bundle, numerics = parts(tiny)
    model = run.model
    vae, denoiser = (bundle.load(model, name, OPTIONS) for name in ("vae", "denoiser"))
    side = model.bucket_step * 4
    pixels = torch.zeros(2, 3, side, 2 * side)
    with torch.no_grad():
        latents = bundle.encode_images(vae, pixels, None)
        shape = (2, *model.latent_shape((2 * side, side)))
        assert latents.shape == shape
        text = bundle.encode_texts(
            text_encoders(run, bundle), bundle.load_tokenizers(model), ["a", "b"], numerics, False
        )
        item = run.collection.items[0]
        known = {"latents": latents[0], "controls": latents[0], "image": torch.zeros(model.image_tokens, 20)}
        learned = bundle.learned(item, still_view(item), numerics.guidance, known)
        text |= {key[5:]: x.expand(2, *x.shape) for key, x in learned.items() if key.startswith("cond.")}
        process = bundle.process(numerics)
        t = torch.tensor([1, process.num_timesteps - 1])
        noisy = process.noisy(latents, torch.randn(shape), t)
        assert bundle.denoise(denoiser, noisy.x_t, t, text).shape == shape
        decoded = bundle.decode_latents(vae, latents)
        assert (decoded[:, :, 0] if model.makes_video else decoded).shape == pixels.shape
    assert all(tensor.shape[0] == 2 for tensor in text.values())


def test_an_item_encodes_alike_alone_and_in_company(tiny: Place) -> None:
    run, bundle, numerics = parts(tiny)
    encoder, tokenizer = text_encoders(run, bundle), bundle.load_tokenizers(run.model)
    with torch.no_grad():
        alone = bundle.encode_texts(encoder, tokenizer, ["one", "one"], numerics, False)
        company = bundle.encode_texts(encoder, tokenizer, ["one", "quite another text"], numerics, False)
    assert all(torch.equal(alone[name][0], company[name][0]) for name in alone)


def test_targets_are_layers_of_the_model(tiny: Place) -> None:
    run, bundle, _ = parts(tiny)
    assert run.targets
    modules = {name: bundle.load(run.model, name, OPTIONS) for name in {target.component for target in run.targets}}
    for target in run.targets:
        layer: Any = modules[target.component].get_submodule(target.name)
        assert layer.weight.shape[:2] == (target.outputs, target.inputs)
    assert len({(target.kohya, target.part) for target in run.targets}) == len(run.targets)
    everything = run.spec.layers(run.model)
    assert {target.full_name for target in run.targets} <= {target.full_name for target in everything}
    assert len({(target.kohya, target.part) for target in everything}) == len(everything)
    assert len({target.diffusers for target in everything}) == len(everything)


def test_memory_grows_with_what_it_should_grow_with(tiny: Place) -> None:
    from runner.plan.estimate import figures

    def peak(*settings: str) -> int:
        return figures(planned(tiny.file, *settings), None).memory.phases["train"]

    base = peak()
    assert peak("dataset.batch_size=8") > base
    assert peak("network.rank=64") > base
    assert peak("dataset.batch_size=8", "training.memory.gradient_checkpointing=true") < peak("dataset.batch_size=8")
    if "training.components.text_encoder_1" not in prepared(tiny.file).spec.refused_keys:
        assert peak("training.components.text_encoder_1=true") > base
    assert peak('training.optimizer.type="adamw8bit"', "network.rank=64") < peak("network.rank=64")
    assert peak("training.ema.decay=0.9", "network.rank=64") > peak("network.rank=64")


def test_a_model_is_saved_and_read_again(tiny: Place, tmp_path: Path) -> None:
    run, bundle, numerics = parts(tiny)
    states = {name: dict(bundle.load(run.model, name, OPTIONS).state_dict()) for name in run.model.components}
    bundle.save_pipeline(tmp_path / "saved", run.model, states, numerics.prediction_type, False)
    tiny.write({"model": {"checkpoint": str(tmp_path / "saved")}})
    again = prepared(tiny.file)
    for name, state in states.items():
        module = bundle.load(again.model, name, OPTIONS)
        assert all(torch.equal(state[key], tensor) for key, tensor in module.state_dict().items())


def test_weights_from_scratch_come_from_the_seed(tiny: Place) -> None:
    run, bundle, _ = parts(tiny)
    torch.manual_seed(99)
    one, two, other = (
        bundle.load(
            run.model,
            "denoiser",
            LoadOptions(dtype=torch.float32, device=torch.device("cpu"), attention="sdpa", scratch_seed=seed),
        )
        for seed in (1, 1, 2)
    )
    states = [module.state_dict() for module in (one, two, other)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])
