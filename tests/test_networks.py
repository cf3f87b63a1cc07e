"""Every kind of adapter on every family: what it adds, what its files say, and the settings of [network]."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from runner.errors import Invalid, InvalidConfig
from runner.families.contract import LoadOptions
from runner.families.registry import family
from runner.formats.adapter_read import read_adapters, read_lora
from runner.formats.adapter_write import Base, diffusers_state, kohya_state
from runner.inputs.cache import TextsInputs
from runner.inputs.train import TrainInputs
from runner.model.targets import Target
from runner.networks.attach import Dropouts, attach
from runner.networks.merge import merged
from runner.networks.shapes import adapter_shapes, count_parameters
from runner.plan.compile import compile_graph
from runner.plan.prepare import Prepared
from runner.weights.tensors import write_tensors
from tests.adapters import merged_file
from tests.inprocess import applied, prepared, trained_bytes
from tests.support import Place

KINDS = ["lora", "dora", "loha", "lokr", "oft"]
FAMILIES = ["sd15", "sdxl", "sd3"]
OPTIONS = LoadOptions(dtype=torch.float32, device=torch.device("cpu"))
Adapted = tuple[Prepared, dict[str, nn.Module], dict[str, nn.Parameter]]


def components(name: str) -> dict[str, bool]:
    return {f"text_encoder_{number}": True for number in range(1, {"sd15": 1, "sdxl": 2, "sd3": 3}[name] + 1)}


def adapted(place: Place, name: str, **network: Any) -> Adapted:
    """The tiny model with random adapters on everything that can have them."""
    alpha = {} if network.get("type") == "oft" else {"alpha": 1.0}
    place.write({"network": {"rank": 2, **alpha, **network}, "training": {"components": components(name)}})
    run = prepared(place.file)
    modules = {key: family(name).load(run.model, key, OPTIONS) for key in ("denoiser", *run.model.text_encoders)}
    parameters = attach(modules, run.targets, Dropouts(), network.get("decompose_factor", -1), 1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return run, modules, parameters


def base_of(run: Prepared) -> dict[str, dict[str, Tensor]]:
    bundle = family(run.spec.name)
    names = ("denoiser", *run.model.text_encoders)
    return {name: dict(bundle.load(run.model, name, OPTIONS).state_dict()) for name in names}


def close(ours: dict[str, dict[str, Tensor]], theirs: dict[str, dict[str, Tensor]]) -> None:
    for name, tensors in theirs.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(ours[name][key], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_merged_weights_do_what_the_adapter_does(family_place: Callable[..., Place], name: str, kind: str) -> None:
    run, modules, parameters = adapted(family_place(name), name, type=kind)
    assert count_parameters(run.targets) == sum(parameter.numel() for parameter in parameters.values())
    state = {key: parameter.detach() for key, parameter in parameters.items()}
    plain = {key: family(name).load(run.model, key, OPTIONS) for key in modules}
    before = {key: module.state_dict()[next(iter(module.state_dict()))].clone() for key, module in plain.items()}
    for key, tensors in merged(run.targets, state, base_of(run)).items():
        plain[key].load_state_dict(tensors)
    assert before
    encoders = {key: module for key, module in modules.items() if key != "denoiser"}
    tokenizers = family(name).load_tokenizers(run.model)
    numerics = compile_graph(run).of(TrainInputs).numerics
    with torch.no_grad():
        ours = family(name).encode_texts(encoders, tokenizers, ["a star", "b"], numerics, False)
        theirs = family(name).encode_texts(
            {key: plain[key] for key in encoders}, tokenizers, ["a star", "b"], numerics, False
        )
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-4)
        if name == "sdxl":
            ours["time_ids"] = torch.ones(2, 6)
        x = torch.randn(2, run.model.latent_channels, 16, 16, generator=torch.Generator().manual_seed(2))
        t = torch.tensor([10, 700])
        answers = [family(name).denoise(model["denoiser"], x, t, ours) for model in (modules, plain)]
        torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_files_are_read_back(
    family_place: Callable[..., Place], tmp_path: Path, name: str, kind: str, form: str
) -> None:
    """Each direction by merged weights; the run's own parameters come back where the format holds them."""
    run, _, parameters = adapted(family_place(name), name, type=kind)
    state = {key: parameter.detach() for key, parameter in parameters.items()}
    base = base_of(run)
    expected = merged(run.targets, state, base)
    file = tmp_path / "x.safetensors"
    if form == "kohya":
        write_tensors(file, kohya_state(run.targets, state, torch.float32, Base(base, run.spec.layers(run.model))))
    else:
        write_tensors(file, *diffusers_state(run.targets, state, torch.float32))
    close(merged_file(run, file), expected)
    if kind == "oft" and form == "kohya":
        return  # differences of weights, which start no rotation
    again = read_adapters(file, run.targets)
    assert set(again) == set(state)
    close(merged(run.targets, again, base), expected)


@pytest.mark.parametrize(
    "network", [{}, {"targets": "attention"}, {"type": "dora"}, {"rslora": True, "alpha_pattern": {"to_out": 3.0}}]
)
@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_kohyas_file_merges_into_the_original_layout(
    family_place: Callable[..., Place], name: str, network: dict[str, Any]
) -> None:
    """W + up @ down * alpha / rank on the checkpoint's own fused tensors is the merged model in the original layout."""
    run, _, parameters = adapted(family_place(name), name, **network)
    state = {key: parameter.detach() for key, parameter in parameters.items()}
    base = base_of(run)
    bundle = family(name)
    expected = bundle.denoiser_file(run.model, "denoiser", merged(run.targets, state, base)["denoiser"])
    original = bundle.denoiser_file(run.model, "denoiser", base["denoiser"])
    written = kohya_state(run.targets, state, torch.float32)
    by_name = {
        f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}": key for key in original if key.endswith(".weight")
    }
    modules = {key.removesuffix(".alpha") for key in written if key.startswith("lora_unet") and key.endswith(".alpha")}
    assert modules <= by_name.keys()
    for module in modules:
        weight = original[by_name[module]]
        down, up = written[f"{module}.lora_down.weight"], written[f"{module}.lora_up.weight"]
        scale = float(written[f"{module}.alpha"]) / down.shape[0]
        changed = weight.flatten(1) + (up.flatten(1) @ down.flatten(1)) * scale
        if f"{module}.dora_scale" in written:
            changed = changed * (written[f"{module}.dora_scale"] / changed.norm(dim=1, keepdim=True))
        torch.testing.assert_close(changed.reshape(weight.shape), expected[by_name[module]], rtol=1e-5, atol=1e-5)
    untouched = set(original) - {by_name[module] for module in modules}
    assert all(torch.equal(original[key], expected[key]) for key in untouched)


def test_kohyas_split_qkv_is_read_with_its_true_strength(family_place: Callable[..., Place], tmp_path: Path) -> None:
    """sd-scripts saves a first factor for each of q, k and v in one tensor, with the alpha of one of them."""
    run, _, parameters = adapted(family_place("sd3"), "sd3", targets="attention")
    state = {key: parameter.detach() for key, parameter in parameters.items()}
    expected = merged(run.targets, state, base_of(run))
    written = kohya_state(run.targets, state, torch.float32)
    for module in {target.kohya for target in run.targets if target.part[1] > 1}:
        written[f"{module}.lora_up.weight"] /= 0.5  # ours has the scale in it
        written[f"{module}.alpha"] = torch.tensor(1.0)
    write_tensors(tmp_path / "x.safetensors", written)
    close(merged_file(run, tmp_path / "x.safetensors"), expected)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_diffusers_itself_loads_what_is_written(family_place: Callable[..., Place], tmp_path: Path, kind: str) -> None:
    """StableDiffusion3Pipeline and StableDiffusionXLPipeline, loading our files, answer as our adapters do."""
    import diffusers

    for name, cls in (("sdxl", diffusers.StableDiffusionXLPipeline), ("sd3", diffusers.StableDiffusion3Pipeline)):
        place = family_place(name)
        place.write({"network": {"rank": 2, "alpha": 1.0, "type": kind}})
        run = prepared(place.file)
        modules = {"denoiser": family(name).load(run.model, "denoiser", OPTIONS)}
        parameters = attach(modules, run.targets, Dropouts(), -1, 1)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        tensors, metadata = diffusers_state(
            run.targets, {key: value.detach() for key, value in parameters.items()}, torch.float32
        )
        write_tensors(tmp_path / f"{name}.safetensors", tensors, metadata)
        pipeline = cls.from_pretrained(place.folder / "model", local_files_only=True)
        pipeline.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors")
        theirs = pipeline.unet if name == "sdxl" else pipeline.transformer
        hidden = torch.randn(1, 9, run.model.text_width, generator=generator)
        pooled = torch.randn(1, run.model.text_extra - (6 if name == "sdxl" else 0), generator=generator)
        conditioning = {"hidden": hidden, "pooled": pooled, "time_ids": torch.ones(1, 6)}
        x = torch.randn(1, run.model.latent_channels, 16, 16, generator=generator)
        with torch.no_grad():
            answers = [
                family(name).denoise(model, x, torch.tensor([300]), conditioning)
                for model in (modules["denoiser"], theirs)
            ]
        torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-5)


def test_peft_itself_loads_loha_and_lokr(family_place: Callable[..., Place]) -> None:
    import peft

    for kind, config in (("loha", peft.LoHaConfig), ("lokr", peft.LoKrConfig)):
        place = family_place("sd15")
        run, modules, parameters = adapted(place, "sd15", type=kind)
        tensors, _ = diffusers_state(
            run.targets, {key: value.detach() for key, value in parameters.items()}, torch.float32
        )
        own = [target for target in run.targets if target.component == "denoiser"]
        fresh = family("sd15").load(run.model, "denoiser", OPTIONS)
        model = peft.inject_adapter_in_model(
            config(r=2, alpha=2.0, target_modules=[target.name for target in own]), fresh
        )
        state = {key.removeprefix("unet."): value for key, value in tensors.items() if key.startswith("unet.")}
        outcome = peft.set_peft_model_state_dict(model, state)
        assert not outcome.unexpected_keys
        x, hidden = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 16)
        with torch.no_grad():
            answers = [
                family("sd15").denoise(m, x, torch.tensor([300]), {"hidden": hidden})
                for m in (modules["denoiser"], fresh)
            ]
        torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-5)
        place.folder.rename(place.folder.with_name(f"done_{kind}"))


# --- settings ---------------------------------------------------------------------------------------------------------


def last_weights(place: Place, **changes: Any) -> dict[str, Tensor]:
    from safetensors.torch import load

    return load(trained_bytes(place.write(changes)))


@pytest.mark.parametrize(
    "setting",
    [
        {"dropout": 0.3},
        {"rank_dropout": 0.3},
        {"module_dropout": 0.3},
        {"type": "lokr", "rank_dropout": 0.3},
        {"type": "loha", "module_dropout": 0.3},
    ],
)
def test_dropouts_are_drawn_from_the_seed(place: Place, setting: dict[str, Any]) -> None:
    kind = {"type": setting["type"]} if "type" in setting else {}
    first = last_weights(place, network=setting)
    place.write({"network": setting, "run": {"name": "again"}})
    import shutil

    shutil.rmtree(place.folder / ".runner" / "artifacts")
    again = last_weights(place, network=setting, run={"name": "again"})
    without = last_weights(place, network=kind, run={"name": "without"})
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], without[key]) for key in first)


def test_lora_plus_trains_the_zero_half_faster(place: Place) -> None:
    slow = last_weights(place, training={"max_train_steps": 1, "optimizer": {"weight_decay": 0.0}})
    fast = last_weights(
        place, network={"lora_plus_ratio": 8.0}, training={"max_train_steps": 1, "optimizer": {"weight_decay": 0.0}}
    )
    for key in slow:
        if key.endswith("lora_A"):
            assert torch.equal(slow[key], fast[key])
        else:
            torch.testing.assert_close(fast[key], slow[key] * 8)


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_weight_norms_are_kept_below_the_limit(family_place: Callable[..., Place], name: str) -> None:
    place = family_place(name)
    limit = 0.02
    found = last_weights(place, network={"scale_weight_norms": limit}, training={"learning_rate": 0.05})
    run = prepared(place.file)
    groups: dict[str, list[Target]] = {}
    for target in run.targets:
        groups.setdefault(target.kohya if target.tied else target.full_name, []).append(target)
    norms = []
    for group in groups.values():
        down = found[f"{group[0].full_name}.lora_A"].flatten(1)
        ups = torch.cat([found[f"{target.full_name}.lora_B"].flatten(1) for target in group])
        norms.append(float((ups @ down).norm() * group[0].scale))
    assert max(norms) <= limit * 1.001
    assert max(norms) > limit * 0.9


def test_base_weights_are_merged_first(place: Place) -> None:
    """Training starts from the merged model; the file's content decides whether the run is the same."""
    place.write({"training": {"learning_rate": 0.05}})
    applied(place.file)
    file = place.folder / "first.safetensors"
    file.write_bytes((place.output / "best.safetensors").read_bytes())
    plain = prepared(place.write({"run": {"name": "second"}}))
    changes = {"run": {"name": "second"}, "network": {"base_weights": ["first.safetensors:0.7"]}}
    run = prepared(place.write(changes))
    assert compile_graph(run).fingerprint("train") != compile_graph(plain).fingerprint("train")
    outcome = applied(place.file)
    assert outcome.selection is not None
    other = prepared(place.write({**changes, "network": {"base_weights": ["first.safetensors"]}}))
    assert compile_graph(other).fingerprint("train") != compile_graph(run).fingerprint("train")
    second = prepared(place.write(changes))
    scores = {row["step"]: row["stable_loss"] for row in outcome.selection["candidates"]}
    plain_scores = applied(place.write({"run": {"name": "third"}})).selection["candidates"]
    assert scores[2] != plain_scores[0]["stable_loss"]
    assert second.merged_first


def test_base_weights_reach_frozen_text_encoders(place: Place) -> None:
    """An adapter of the text encoder changes what captions and prompts are encoded to, and so the keys of the cache."""
    place.write({"training": {"learning_rate": 0.05, "components": {"text_encoder_1": True}}})
    applied(place.file)
    (place.folder / "first.safetensors").write_bytes((place.output / "best.safetensors").read_bytes())
    found = {}
    for name, network in (("plain", {}), ("merged", {"base_weights": ["first.safetensors"]})):
        place.write({"run": {"name": name}, "network": network})
        applied(place.file, until="cache")
        run = prepared(place.file)
        encoder, texts = compile_graph(run).of(TextsInputs).encoder, compile_graph(run).runtime.text_batch_size
        key = encoder.key(run.collection.items[0].text.strip(), texts)
        found[name] = load_file(run.store.item("text", key))["hidden"]
    assert not torch.allclose(found["plain"], found["merged"], atol=1e-4)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"type": "oft", "conv_rank": 2}, "oft on 3x3 convolutions"),
        ({"type": "dora", "rank_dropout": 0.1}, "`rank_dropout` is not for dora"),
        ({"type": "loha", "dropout": 0.1}, "`dropout` is not for loha"),
        ({"type": "oft", "scale_weight_norms": 1.0}, "`scale_weight_norms` is for lora"),
        ({"type": "oft", "module_dropout": 0.1}, "`module_dropout` is not for oft"),
        ({"decompose_factor": 4}, "`decompose_factor` is for lokr"),
        ({"base_weights": ["nothing.safetensors"]}, "there is no file"),
        (
            {"base_weights": ["odd.safetensors"]},
            "odd.safetensors does not fit: none of its 1 layers belongs to this model (its first is lora_unet_x)",
        ),
        ({"rank": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(place: Place, network: dict[str, Any], message: str) -> None:
    write_tensors(
        place.folder / "odd.safetensors",
        {"lora_unet_x.lora_down.weight": torch.zeros(1, 1), "lora_unet_x.lora_up.weight": torch.zeros(1, 1)},
    )
    result = place.run("validate", str(place.write({"network": network})))
    assert result.code == 3
    assert message in result.out + result.err


def test_a_lora_of_another_family_is_refused(family_place: Callable[..., Place]) -> None:
    sdxl, sd3 = family_place("sdxl"), family_place("sd3")
    run, _, parameters = adapted(sdxl, "sdxl")
    file = sd3.folder / "sdxl.safetensors"
    write_tensors(file, kohya_state(run.targets, {k: v.detach() for k, v in parameters.items()}, torch.float32))
    with pytest.raises(InvalidConfig, match="does not fit"):
        prepared(sd3.write({"network": {"init_from": "sdxl.safetensors"}}))
    with pytest.raises(Invalid, match="are not this model's"):
        read_lora(file, prepared(sd3.write({})).spec.layers(prepared(sd3.file).model), 1.0)


def test_shapes_are_those_of_the_parameters(family_place: Callable[..., Place]) -> None:
    for kind in KINDS:
        run, _, parameters = adapted(family_place(f"{'sd15'}"), "sd15", type=kind)
        for target in run.targets:
            for name, shape in adapter_shapes(target).items():
                assert tuple(parameters[f"{target.full_name}.{name}"].shape) == shape
        (run.folder).rename(run.folder.with_name(f"done_{kind}"))
