"""Adapters published as "comfyui", under ComfyUI's own rule: every key is in its map, and its weights are ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from runner.families.contract import LoadOptions
from runner.families.parts.clip import t5_layers
from runner.families.parts.files import CONFIGS, read_json
from runner.families.registry import family, family_spec
from runner.formats.adapter_modules import file_modules, needs_base
from runner.formats.adapter_write import Base, kohya_state
from runner.model.layers import parameters
from runner.model.targets import Target
from runner.networks.attach import Dropouts, attach
from runner.networks.merge import merged
from runner.plan.prepare import Prepared
from tests.comfyui_rule import applied, key_map, text_key_map
from tests.inprocess import prepared
from tests.support import DATA, Place, family_changes

FAMILIES = ["sd15", "sdxl", "sd3", "hunyuan_video", "framepack", "flux1", "chroma"]
KINDS = ["lora", "dora", "loha", "lokr", "oft"]
OPTIONS = LoadOptions(dtype=torch.float32, device=torch.device("cpu"))
ENCODERS = {"sd15": 1, "sdxl": 2, "sd3": 3, "flux1": 2, "chroma": 1}
KEY_LISTS = {
    "sd15": "checkpoint_sd15_keys",
    "sdxl": "checkpoint_sdxl_keys",
    "sd3": "checkpoint_sd3_medium_keys",
    "hunyuan_video": "hunyuan_dit_keys",
    "framepack": "framepack_dit_keys",
    "flux1": "flux1_dev_bfl_keys",
    "chroma": "chroma_bfl_keys",
}


def configured(place: Place, name: str, **network: Any) -> Prepared:
    training = {"components": {f"text_encoder_{number}": True for number in range(1, ENCODERS.get(name, 0) + 1)}}
    alpha = {} if network.get("type") == "oft" else {"alpha": 1.0}
    place.write({"network": {"rank": 2, **alpha, **network}, "training": training})
    return prepared(place.file)


def written(
    place: Place, name: str, form: Any = "comfyui", **network: Any
) -> tuple[Prepared, dict[str, Tensor], dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """(run, an export of random adapters, the weights, the weights with the adapters merged)."""
    run = configured(place, name, **network)
    bundle = family(name)
    names = ("denoiser", *(run.model.text_encoders if name in ENCODERS else ()))
    modules = {key: bundle.load(run.model, key, OPTIONS) for key in names}
    base = {key: {k: x.clone() for k, x in module.state_dict().items()} for key, module in modules.items()}
    generator = torch.Generator().manual_seed(5)
    attached = attach(modules, run.targets, Dropouts(), network.get("decompose_factor", -1), 1)
    state = {key: x.detach() + 0.1 * torch.randn(x.shape, generator=generator) for key, x in attached.items()}
    whole = Base(base, run.spec.layers(run.model)) if needs_base(run.targets, form) else None
    return run, kohya_state(run.targets, state, torch.float32, whole, form), base, merged(run.targets, state, base)


def assert_comfyui_agrees(name: str, run: Prepared, file: dict[str, Tensor], base: Any, expected: Any) -> None:
    bundle = family(name)
    weights = bundle.denoiser_file(run.model, "denoiser", base["denoiser"])
    wanted = bundle.denoiser_file(run.model, "denoiser", expected["denoiser"])
    encoders = {key: own for key, own in base.items() if key != "denoiser"}
    for key, own in encoders.items():
        weights |= {f"{key}.{k}": x for k, x in own.items()}
        wanted |= {f"{key}.{k}": x for k, x in expected[key].items()}
    places = key_map(
        name, [key for key in weights if not key.startswith("text_encoder")], run.model.components["denoiser"].config
    )
    if name == "sd3":  # the tiny model's width is not 64 times its depth
        width = bundle_width(run)
        places = {
            key: (place if place.rows is None else place._replace(rows=(place.rows[0] // place.rows[1] * width, width)))
            for key, place in places.items()
        }
    found = applied(file, {**places, **text_key_map(name, encoders)}, weights)
    changed = 0
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
        changed += not torch.equal(tensor, weights[key])
    assert changed >= 10


def bundle_width(run: Prepared) -> int:
    config = run.model.components["denoiser"].config
    return int(config["num_attention_heads"] * config["attention_head_dim"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_comfyui_makes_the_weights_that_were_trained(family_place: Callable[..., Place], name: str, kind: str) -> None:
    run, file, base, expected = written(family_place(name), name, type=kind)
    assert_comfyui_agrees(name, run, file, base, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_the_text_projection_is_known(family_place: Callable[..., Place], name: str, kind: str) -> None:
    targets = [r"attn1?\.to_q$", "text_projection"]
    run, file, base, expected = written(family_place(name), name, type=kind, targets=targets)
    assert any(key.startswith("lora_te2_text_projection.") for key in file)
    assert_comfyui_agrees(name, run, file, base, expected)


PATTERNS: dict[str, dict[str, Any]] = {
    "alpha of a part of q, k, v": {"alpha_pattern": {"to_q|add_k_proj|proj_mlp": 4.0}},
    "rank of a part of q, k, v": {"rank_pattern": {"to_k|add_v_proj|proj_mlp": 4}, "alpha_pattern": {"to_v": 3.0}},
    "some of the parts": {"targets": [r"attn\.to_q$", r"attn\.add_v_proj$", r"proj_mlp$", r"norm_out", r"norm1"]},
    "rslora": {"rslora": True, "rank_pattern": {"to_k": 3}},
}


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
@pytest.mark.parametrize("pattern", list(PATTERNS))
@pytest.mark.parametrize("name", ["sd3", "hunyuan_video", "framepack", "flux1", "chroma"])
@pytest.mark.parametrize("form", ["comfyui", "kohya"])
def test_patterns_inside_a_fused_module(
    family_place: Callable[..., Place], name: str, pattern: str, kind: str, form: str
) -> None:
    """Ranks and alphas of their own for some of q, k and v, or adapters on some of them only."""
    network = dict(PATTERNS[pattern])
    if "targets" in network:
        lacking = {"sd3": [r"proj_mlp$"], "chroma": ["norm_out", "norm1"]}.get(name, [])
        network["targets"] = [text for text in network["targets"] if text not in lacking]
    run, file, base, expected = written(family_place(name), name, form, type=kind, **network)
    if form == "comfyui":
        assert_comfyui_agrees(name, run, file, base, expected)
    elif kind == "lora":
        assert_original_layout(name, run, file, base, expected)


def assert_original_layout(name: str, run: Prepared, file: dict[str, Tensor], base: Any, expected: Any) -> None:
    """Kohya's rule on the checkpoint's own tensors: W + up @ down * alpha / rank, under the path with underscores."""
    weights = family(name).denoiser_file(run.model, "denoiser", base["denoiser"])
    wanted = family(name).denoiser_file(run.model, "denoiser", expected["denoiser"])
    used = 0
    for key, weight in weights.items():
        module = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
        if f"{module}.alpha" in file:
            down, up = file[f"{module}.lora_down.weight"], file[f"{module}.lora_up.weight"]
            weight = weight + up @ down * (float(file[f"{module}.alpha"]) / down.shape[0])
            used += 3
        torch.testing.assert_close(weight, wanted[key], rtol=1e-5, atol=1e-5)
    assert used == len([key for key in file if key.startswith("lora_unet_")])


def full_targets(place: Place, name: str, **network: Any) -> tuple[list[Target], dict[str, Any]]:
    """Targets and the denoiser's configuration of the full-size model, from the description alone."""
    run = configured(place, name, **network)
    folders = {"denoiser": "unet" if name in ("sd15", "sdxl") else "transformer"}
    folders |= {f"text_encoder_{n}": "text_encoder" if n == 1 else f"text_encoder_{n}" for n in range(1, 4)}
    configs = {
        key: json.loads((CONFIGS / name / folder / "config.json").read_text())
        for key, folder in folders.items()
        if key in run.model.components and key in ("denoiser", *run.model.text_encoders)
    }
    parts = {key: replace(part, config=configs.get(key, part.config)) for key, part in run.model.components.items()}
    return run.spec.targets(run.config, replace(run.model, components=parts)), configs["denoiser"]


@pytest.mark.parametrize("network", [{}, {"type": "loha"}, {"targets": [r"."]}, {"targets": "attention"}], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_module_of_the_full_size_model_is_known(
    family_place: Callable[..., Place], name: str, network: dict[str, Any]
) -> None:
    """Against the key list of the real checkpoint."""
    targets, config = full_targets(family_place(name), name, **network)
    listed = json.loads((DATA / f"{KEY_LISTS[name]}.json").read_text())
    listed = listed.get("keys", listed)
    prefix = "model.diffusion_model."
    keys = [
        key.removeprefix(prefix)
        for key in listed
        if key.startswith(prefix) or name in ("hunyuan_video", "framepack", "flux1", "chroma")
    ]
    known = set(key_map(name, keys, config))
    modules = file_modules(targets, "comfyui")
    unknown = [module.name for module in modules if not module.name.startswith("lora_te") and module.name not in known]
    assert not unknown
    assert len([module for module in modules if not module.name.startswith("lora_te")]) >= 40
    layers = {
        f"text_encoder_{n}": [
            f"encoder.layers.{i}.{part}.weight"
            for i in range(32)
            for part in ("mlp.fc1", "mlp.fc2", *(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")))
        ]
        for n in (1, 2)
    }
    if name in ("flux1", "chroma"):
        layers[f"text_encoder_{ENCODERS[name]}"] = list(
            parameters(t5_layers(read_json(CONFIGS / "flux1" / "text_encoder_2" / "config.json")))
        )
    if name == "sd3":
        layers["text_encoder_3"] = [
            key.removeprefix("text_encoders.t5xxl.transformer.") for key in listed if ".t5xxl." in key
        ]
    texts = set(text_key_map(name, layers))
    assert not [module.name for module in modules if module.name.startswith("lora_te") and module.name not in texts]


def test_the_families_are_all_here() -> None:
    assert set(FAMILIES) == set(ENCODERS) | {"hunyuan_video", "framepack"}
    assert all(family_spec(name).name == name and family_changes(name) for name in FAMILIES)
