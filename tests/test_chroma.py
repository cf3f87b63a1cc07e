"""Chroma: FLUX.1's blocks under one network's modulations, text that is masked but for one pad."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from runner.families.chroma.architecture import chroma_layers, fitted
from runner.families.chroma.model import denoise
from runner.families.chroma.spec import FINDER
from runner.families.chroma.tiny import TRANSFORMER
from runner.families.contract import LoadOptions
from runner.families.detect import detect
from runner.families.flux1.model import packed
from runner.families.parts.attention import Attention
from runner.families.parts.files import CONFIGS, read_json
from runner.families.parts.load import from_origin
from runner.families.parts.match import match_part
from runner.families.parts.modules import make_module
from runner.families.parts.part import Part
from runner.formats.adapter_read import read_lora
from runner.formats.adapter_write import diffusers_state, kohya_state
from runner.inputs.sample import SampleInputs
from runner.model.layers import count, origins, parameters
from runner.networks.merge import merge_into
from runner.networks.shapes import adapter_shapes
from tests.inprocess import applied, prepared
from tests.ready import ready
from tests.stand_in import write_shapes
from tests.support import DATA, Place

Make = Callable[..., Place]
DENOISER = FINDER.parts[0]


def listed(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(shape) for key, shape in json.loads((DATA / f"{name}.json").read_text()).items()}


def shipped(part: Part) -> dict[str, Any]:
    return read_json(CONFIGS / "chroma" / part.folder / "config.json")


@pytest.mark.parametrize("part", FINDER.parts, ids=lambda part: part.name)
def test_the_described_layers_are_those_of_the_classes(part: Part) -> None:
    config = shipped(part)
    with torch.device("meta"):
        module = make_module(part.module, config)
    left_out = "encoder.embed_tokens.weight"
    own = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items() if key != left_out}
    assert parameters(part.module.layers(config)) == own
    assert count(part.module.layers(config)) == sum(parameter.numel() for parameter in module.parameters())


def test_every_key_of_the_published_file_is_read(tmp_path: Path) -> None:
    keys = listed("chroma_bfl_keys")
    assert detect(str(write_shapes(tmp_path / "x.safetensors", keys)))[0] == "chroma"
    for found in (keys, {key.replace(".scale", ".weight"): shape for key, shape in keys.items()}):
        named = {key: ("F16", shape) for key, shape in found.items()}
        config = fitted({**shipped(DENOISER), "num_layers": 1, "approximator_layers": 1}, named)
        assert config == shipped(DENOISER)
        match = match_part(DENOISER, config, named)
        assert match.problem is None
        assert {origin.key for origin in match.keys.values()} == set(found)
    assert count(chroma_layers(shipped(DENOISER))) == 8_899_983_424


def fixture() -> tuple[Any, dict[str, Any], dict[str, Tensor], Callable[[], Tensor]]:
    """The tiny original model's weights in diffusers' class, its configuration, its file, and its answer by our call."""
    file = load_file(DATA / "chroma_tiny.safetensors")
    state = {key.removeprefix("model."): x for key, x in file.items() if key.startswith("model.")}
    config = {**TRANSFORMER, "patch_size": 1, "out_channels": None, "joint_attention_dim": 12, "approximator_layers": 5}
    module = make_module(DENOISER.module, config)
    found = {
        name: from_origin(state[origin.key], origin) for name, origin in origins(chroma_layers(config), "").items()
    }
    module.load_state_dict(found, strict=True)
    assert DENOISER.module.finish is not None
    resolve_name(DENOISER.module.finish)(module, LoadOptions(dtype=torch.float32, device=torch.device("cpu")))
    resolve_name(DENOISER.module.attention)(module, Attention())
    rows, columns = (int(file["img_ids"][:, axis].max()) + 1 for axis in (1, 2))
    x = torch.nn.functional.pixel_shuffle(file["packed_input"].transpose(1, 2).unflatten(2, (rows, columns)), 2)
    mask = (torch.arange(file["text"].shape[1]) <= file["token_mask"].sum(1, keepdim=True)).float()

    def answer() -> Tensor:
        with torch.no_grad():
            return packed(denoise(module.eval(), x, 1000 * file["sigma"], {"hidden": file["text"], "mask": mask}))

    return module, config, file, answer


def test_the_denoiser_and_its_lora_answer_as_the_original_model(family_place: Make, tmp_path: Path) -> None:
    """sd-scripts' class with the same weights; then with a LoRA of Kohya's names merged."""
    module, config, file, answer = fixture()
    torch.testing.assert_close(answer(), file["output"], rtol=1e-4, atol=5e-5)
    run = prepared(family_place("chroma").file)
    model = replace(run.model, components={"denoiser": replace(run.model.components["denoiser"], config=config)})
    save_file(
        {key.removeprefix("lora."): x for key, x in file.items() if key.startswith("lora.")}, tmp_path / "l.safetensors"
    )
    lora = read_lora(tmp_path / "l.safetensors", run.spec.layers(model), 1.0)
    assert not lora.left_out
    merge_into({"denoiser": module}, lora.changes)
    torch.testing.assert_close(answer(), file["output_with_lora"], rtol=1e-4, atol=5e-5)


def pipeline_of(place: Place) -> Any:
    """diffusers' pipeline, whose masks are made bool: as numbers they would be added to the scores."""
    pipeline: Any = diffusers.ChromaPipeline.from_pretrained(place.folder / "model", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    prepare = pipeline._prepare_attention_mask
    pipeline._prepare_attention_mask = lambda **given: prepare(**given).bool()
    return pipeline


def test_a_sample_is_that_of_diffusers_pipeline(family_place: Make) -> None:
    sampling = {
        "num_inference_steps": 4,
        "cfg_scale": 3.0,
        "negative_prompt": "dark and long",
        "width": 48,
        "height": 32,
    }
    place = family_place("chroma", training={"max_train_steps": 1}, sampling=sampling)
    outcome = applied(place.file, until="sample")
    prompt = outcome.graph.of(SampleInputs).prompts[0]
    ours = Image.open(prepared(place.file).store.item("samples", outcome.graph.of(SampleInputs).key(prompt, 0, "raw")))
    theirs = pipeline_of(place)(
        prompt.prompt,
        negative_prompt="dark and long",
        width=48,
        height=32,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(prompt.seed or 0),
    ).images[0]
    assert max(abs(a - b) for a, b in zip(ours.tobytes(), theirs.tobytes(), strict=True)) <= 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_first_loss_is_that_of_a_bare_computation(family_place: Make, checkpointing: bool) -> None:
    """Texts of two lengths in one batch, and the same where activations are computed again."""
    memory = {"gradient_checkpointing": checkpointing}
    place = family_place(
        "chroma", network=None, training={"max_train_steps": 1, "max_grad_norm": 0.0, "memory": memory}
    )
    for number, picture in enumerate(sorted((place.folder / "pics").glob("*.txt"))):
        picture.write_text("a" * (3 + 20 * (number % 2)))
    there = ready(place, torch.device("cpu"))
    task, loader = there.task()
    batch = next(batch for (batch,) in loader.steps_from(0) if len({len(text) for text in batch.texts}) == 2)
    ours = float(task.loss(batch).detach())
    pipeline = pipeline_of(place)
    sigma = (batch.tensors["timesteps"] / 1000).view(-1, 1, 1, 1)
    latents, noise = batch.tensors["latents"], batch.tensors["noise"]
    with torch.no_grad():
        hidden, text_ids, mask, *_ = pipeline.encode_prompt(list(batch.texts), do_classifier_free_guidance=False)
        tokens = pipeline._pack_latents((1 - sigma) * latents + sigma * noise, *latents.shape)
        where = pipeline._prepare_latent_image_ids(
            2, latents.shape[2] // 2, latents.shape[3] // 2, "cpu", torch.float32
        )
        seen = torch.cat([mask.bool(), torch.ones(2, tokens.shape[1], dtype=torch.bool)], dim=1)
        answer = pipeline.transformer(
            hidden_states=tokens,
            timestep=sigma.flatten(),
            encoder_hidden_states=hidden,
            txt_ids=text_ids,
            img_ids=where,
            attention_mask=seen,
            return_dict=False,
        )[0]
        target = pipeline._pack_latents(noise - latents, *latents.shape)
    assert ours == pytest.approx(float(((answer - target) ** 2).mean()), rel=1e-5)


@pytest.mark.parametrize(("fixture", "form"), [("kohya_lora_chroma", "kohya"), ("peft_lora_chroma", "diffusers")])
def test_adapters_keys(family_place: Make, fixture: str, form: str) -> None:
    """The keys and shapes of sd-scripts' and peft's own files of the full-size model."""
    names = [
        r"^transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2))$",
        r"^single_transformer_blocks\.\d+\.attn\.to_[qkv]$",
    ]
    run = prepared(family_place("chroma", network={"rank": 4, "targets": "default" if form == "kohya" else names}).file)
    full = {
        name: replace(part, config=shipped(next(own for own in FINDER.parts if own.name == name)))
        for name, part in run.model.components.items()
    }
    targets = run.spec.targets(run.config, replace(run.model, components=full))
    state = {
        f"{target.full_name}.{name}": torch.zeros(shape)
        for target in targets
        for name, shape in adapter_shapes(target).items()
    }
    written = (
        kohya_state(targets, state, torch.float16)
        if form == "kohya"
        else diffusers_state(targets, state, torch.float16)[0]
    )
    assert {key: tuple(x.shape) for key, x in written.items()} == listed(fixture)
