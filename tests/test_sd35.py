"""Stable Diffusion 3.5: normalised queries and keys, and the medium model's second attention."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from runner.families.detect import detect
from runner.families.parts.files import CONFIGS, read_json
from runner.families.parts.load import from_origin
from runner.families.parts.modules import make_module
from runner.families.sd3.architecture import fitted, mmdit_layers
from runner.families.sd3.spec import TRANSFORMER
from runner.families.sd3.tiny import write_tiny
from runner.formats.adapter_write import kohya_state
from runner.inputs.sample import SampleInputs
from runner.model.layers import count, original_parameters, origins
from runner.networks.shapes import adapter_shapes
from tests.inprocess import applied, prepared
from tests.stand_in import write_shapes
from tests.support import DATA, Place, family_changes, new_place

SHIPPED = read_json(CONFIGS / "sd3" / "transformer" / "config.json")
PREFIX = "model.diffusion_model."
MEDIUM: dict[str, Any] = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}


def listed(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(shape) for key, shape in json.loads((DATA / f"{name}.json").read_text()).items()}


def architecture(size: str) -> dict[str, Any]:
    return dict(fitted(SHIPPED, {key: ("F16", shape) for key, shape in listed(f"sd35_{size}_keys").items()}))


@pytest.mark.parametrize(("size", "parameters"), [("medium", 2_243_171_520), ("large", 8_056_627_520)])
def test_the_architecture_is_told_by_the_files_keys(size: str, parameters: int, tmp_path: Path) -> None:
    keys = listed(f"sd35_{size}_keys")
    config = architecture(size)
    assert count(mmdit_layers(config)) == parameters
    ours = original_parameters(mmdit_layers(config), PREFIX)
    assert ours == {key: shape for key, shape in keys.items() if key.startswith(PREFIX)}
    with torch.device("meta"):
        module = make_module(TRANSFORMER, config)
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters
    assert detect(str(write_shapes(tmp_path / "x.safetensors", keys)))[0] == "sd3"


def test_names_are_those_of_diffusers_converter() -> None:
    """The same tensors under diffusers' names, as its own reader of single files makes them."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers as convert

    config = {
        **SHIPPED,
        "num_layers": 3,
        "num_attention_heads": 2,
        "caption_projection_dim": 128,
        "joint_attention_dim": 20,
        "pooled_projection_dim": 10,
        "pos_embed_max_size": 8,
        "qk_norm": "rms_norm",
        "dual_attention_layers": [0, 1],
    }
    layers = mmdit_layers(config)
    generator = torch.Generator().manual_seed(1)
    state = {key: torch.randn(shape, generator=generator) for key, shape in original_parameters(layers, "").items()}
    assert fitted(SHIPPED, {key: ("F32", tuple(x.shape)) for key, x in state.items()}) == {
        **SHIPPED,
        **{
            name: config[name]
            for name in (
                "num_layers",
                "num_attention_heads",
                "caption_projection_dim",
                "pos_embed_max_size",
                "qk_norm",
                "dual_attention_layers",
            )
        },
    }
    theirs = convert(dict(state))
    ours = {name: from_origin(state[origin.key], origin) for name, origin in origins(layers, "").items()}
    assert set(ours) == set(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.fixture
def medium(tmp_path: Path) -> Place:
    write_tiny(tmp_path / "model", **MEDIUM)
    place = new_place(tmp_path / "place", tmp_path / "model")
    place.base = family_changes("sd3")
    place.write()
    return place


@pytest.mark.parametrize("size", ["medium", "large"])
def test_kohyas_keys(medium: Place, size: str) -> None:
    components = {"text_encoder_1": True, "text_encoder_2": True}
    run = prepared(medium.write({"network": {"rank": 4}, "training": {"components": components}}))
    parts = {name: part for name, part in run.model.components.items() if name != "text_encoder_3"}
    configs = {
        "denoiser": architecture(size),
        "text_encoder_1": read_json(CONFIGS / "sd3" / "text_encoder" / "config.json"),
        "text_encoder_2": read_json(CONFIGS / "sd3" / "text_encoder_2" / "config.json"),
    }
    full = replace(
        run.model,
        components={name: replace(part, config=configs.get(name, part.config)) for name, part in parts.items()},
    )
    targets = run.spec.targets(run.config, full)
    state = {
        f"{target.full_name}.{name}": torch.zeros(shape)
        for target in targets
        for name, shape in adapter_shapes(target).items()
    }
    ours = {key: tuple(x.shape) for key, x in kohya_state(targets, state, torch.float16).items()}
    assert ours == listed(f"kohya_lora_sd35_{size}")


def test_it_trains_and_samples_as_diffusers_pipeline(medium: Place) -> None:
    """The base model's picture is the pipeline's; a step of a LoRA reaches the second attention."""
    sampling = {"num_inference_steps": 4, "cfg_scale": 3.0, "negative_prompt": "dark", "width": 48, "height": 32}
    medium.write({"training": {"max_train_steps": 2}, "sampling": sampling})
    outcome = applied(medium.file, until="sample")
    run = prepared(medium.file)
    assert (run.spec.title, run.spec.defaults.cfg_scale) == ("Stable Diffusion 3.5 Medium", 4.5)
    assert any(".attn2." in target.name for target in run.targets)
    prompt = outcome.graph.of(SampleInputs).prompts[0]
    ours = Image.open(run.store.item("samples", outcome.graph.of(SampleInputs).key(prompt, 0, "raw")))
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(medium.folder / "model", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt.prompt,
        negative_prompt="dark",
        width=48,
        height=32,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(prompt.seed or 0),
        max_sequence_length=256,
    ).images[0]
    assert max(abs(a - b) for a, b in zip(ours.tobytes(), theirs.tobytes(), strict=True)) <= 1
