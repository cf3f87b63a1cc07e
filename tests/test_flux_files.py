"""FLUX.1's files: real key lists, fp8 with scales, variants, files of other models, and LoRA of every tool."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from runner.errors import Invalid, InvalidConfig
from runner.families.contract import LoadOptions
from runner.families.detect import detect
from runner.families.flux1.architecture import comfyui_layers, fitted, flux_layers
from runner.families.flux1.model import denoise, packed
from runner.families.flux1.spec import FINDER
from runner.families.flux1.tiny import write_tiny
from runner.families.parts.files import CONFIGS, read_json
from runner.families.parts.match import match_part
from runner.families.parts.modules import make_module
from runner.families.parts.part import Part
from runner.families.registry import family
from runner.formats.adapter_read import read_lora
from runner.formats.adapter_write import diffusers_state, kohya_state
from runner.model.layers import count, parameters
from runner.model.targets import Target
from runner.networks.merge import merge_into
from runner.networks.shapes import adapter_shapes
from tests.inprocess import applied, prepared
from tests.stand_in import write_shapes
from tests.support import DATA, Place
from tests.test_flux import last_place, transformer

Make = Callable[..., Place]
OPTIONS = LoadOptions(dtype=torch.float32, device=torch.device("cpu"))
PARTS = {part.name: part for part in FINDER.parts}


def listed(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(shape) for key, shape in json.loads((DATA / f"{name}.json").read_text()).items()}


def shipped(part: Part) -> dict[str, Any]:
    return read_json(CONFIGS / "flux1" / part.folder / "config.json")


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", FINDER.parts, ids=lambda part: part.name)
@pytest.mark.parametrize("size", ["full", "tiny"])
def test_the_described_layers_are_those_of_the_classes(part: Part, size: str, tmp_path: Path) -> None:
    if size == "tiny":
        write_tiny(tmp_path)
    config = shipped(part) if size == "full" else read_json(tmp_path / part.folder / "config.json")
    with torch.device("meta"):
        module = make_module(part.module, config)
    left_out = ("position_ids", "encoder.embed_tokens.weight")
    own = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items() if not key.endswith(left_out)}
    assert parameters(part.module.layers(config)) == own
    assert count(part.module.layers(config)) == sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "part", "layout", "prefix"),
    [
        ("flux1_dev_bfl_keys", "denoiser", "original", ""),
        ("flux1_dev_bfl_keys", "denoiser", "original", "model.diffusion_model."),
        ("flux1_dev_diffusers_keys", "denoiser", "diffusers", ""),
        ("flux_vae_bfl_keys", "vae", "original", ""),
        ("flux_vae_bfl_keys", "vae", "original", "vae."),
    ],
)
def test_every_key_of_the_published_files_is_read(name: str, part: str, layout: str, prefix: str) -> None:
    found = {prefix + key: ("F16", shape) for key, shape in listed(name).items()}
    match = match_part(PARTS[part], shipped(PARTS[part]), found)
    assert (match.problem, match.layout) == (None, layout)
    assert {origin.key for origin in match.keys.values()} == set(found)
    assert count(PARTS[part].module.layers(shipped(PARTS[part]))) == (
        11_901_408_320 if part == "denoiser" else 83_819_683
    )


def test_files_of_newer_comfyui_are_read() -> None:
    found = {
        key.removesuffix(".scale") + ".weight" if key.endswith("_norm.scale") else key: ("BF16", shape)
        for key, shape in listed("flux1_dev_bfl_keys").items()
    }
    match = match_part(PARTS["denoiser"], shipped(PARTS["denoiser"]), found)
    assert match.problem is None
    assert {origin.key for origin in match.keys.values()} == set(found)


def test_a_file_says_its_blocks_and_its_guidance() -> None:
    """schnell has no guidance embedder; pruned models have fewer blocks."""
    keys = listed("flux1_dev_bfl_keys")
    config = shipped(PARTS["denoiser"])
    assert fitted(config, keys) == config
    schnell = fitted(config, {key: shape for key, shape in keys.items() if "guidance_in" not in key})
    assert count(flux_layers(schnell)) == 11_891_178_560
    pruned = fitted(
        config,
        {
            key: shape
            for key, shape in keys.items()
            if not key.startswith(tuple(f"double_blocks.{n}." for n in range(8, 19)))
        },
    )
    assert (pruned["num_layers"], pruned["num_single_layers"]) == (8, 38)
    assert fitted(config, {f"transformer.{key}": () for key in listed("flux1_dev_diffusers_keys")}) == config


OTHERS = {
    "a FLUX.2 transformer": {"double_stream_modulation_img.lin.weight": [6, 2]},
    "a Chroma Radiance transformer, which works on pixels": {"nerf_blocks.0.norm.scale": [5]},
    "a FLUX.1 transformer of Fill, which takes a picture and its hole": {"img_in.weight": [3072, 384]},
    "a FLUX.1 transformer of Canny or Depth, which takes a control picture": {"img_in.weight": [3072, 128]},
}


@pytest.mark.parametrize("words", list(OTHERS))
def test_relatives_are_told_apart(family_place: Make, words: str) -> None:
    place = family_place("flux1")
    keys = {key: list(shape) for key, shape in listed("flux1_dev_bfl_keys").items()}
    file = write_shapes(place.folder / "x.safetensors", {**keys, **OTHERS[words]})
    with pytest.raises(Invalid, match=f"is {words}"):
        detect(str(file))
    if "Radiance" in words or "FLUX.2" in words:  # what they lack of FLUX.1
        write_shapes(file, {**{key: shape for key, shape in keys.items() if "vector_in" not in key}, **OTHERS[words]})
    place.write({"model": {"checkpoint": "x.safetensors"}})
    with pytest.raises(InvalidConfig, match=f"{file} is {words}; the family is flux1"):
        prepared(place.file)


# --- files and variants -----------------------------------------------------------------------------------------------


def split(place: Place, change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict) -> dict[str, Any]:
    """The tiny model as ComfyUI's four files; the transformer's changed on the way. Returns the keys of [model]."""
    run, bundle = prepared(place.file), family("flux1")
    states = {name: dict(bundle.load(run.model, name, OPTIONS).state_dict()) for name in run.model.components}
    save_file(
        change(bundle.denoiser_file(run.model, "denoiser", states["denoiser"])), place.folder / "flux.safetensors"
    )
    whole = bundle.single_file(run.model, {"vae": states["vae"]})
    save_file({key.removeprefix("vae."): x for key, x in whole.items()}, place.folder / "ae.safetensors")
    for name, file in (("text_encoder", "clip_l"), ("text_encoder_2", "t5xxl")):
        shutil.copy(place.folder / "model" / name / "model.safetensors", place.folder / f"{file}.safetensors")
    return {
        "vae": "ae.safetensors",
        "text_encoder_1": "clip_l.safetensors",
        "text_encoder_2": "t5xxl.safetensors",
        "tokenizer_2": "model/tokenizer_2",
        "tokenizer_1": "model/tokenizer",
        "checkpoint": "flux.safetensors",
    }


@pytest.fixture
def small_configs(monkeypatch: pytest.MonkeyPatch, tiny_models: Callable[[str], Path]) -> None:
    """Files without a configuration are of the tiny model's architecture."""
    from runner.families.parts import checkpoint

    tiny, real = tiny_models("flux1"), checkpoint.read_json
    monkeypatch.setattr(
        checkpoint,
        "read_json",
        lambda file: real(
            tiny / file.relative_to(CONFIGS / "flux1")
            if file.is_relative_to(CONFIGS / "flux1") and file.name == "config.json"
            else file
        ),
    )


def weights(place: Place) -> dict[str, Tensor]:
    run = prepared(place.file)
    return dict(family("flux1").load(run.model, "denoiser", OPTIONS).state_dict())


def test_comfyuis_files_hold_the_same_model(family_place: Make, small_configs: None) -> None:
    place = family_place("flux1")
    wanted = {
        name: dict(family("flux1").load(prepared(place.file).model, name, OPTIONS).state_dict()) for name in PARTS
    }
    model = split(place)
    place.write({"model": model})
    run = prepared(place.file)
    assert run.model.variant == "dev"
    for name, state in wanted.items():
        module = family("flux1").load(run.model, name, OPTIONS)
        assert all(torch.equal(state[key], tensor) for key, tensor in module.state_dict().items()), name
    save_file(
        {key: x.clone() for key, x in family("flux1").single_file(run.model, wanted).items()},
        place.folder / "all.safetensors",
    )
    place.write(
        {
            "model": {
                "checkpoint": "all.safetensors",
                "tokenizer_2": "model/tokenizer_2",
                "tokenizer_1": "model/tokenizer",
            }
        }
    )
    again = weights(place)
    assert all(torch.equal(wanted["denoiser"][key], tensor) for key, tensor in again.items())
    assert any(
        key.startswith("text_encoders.t5xxl.transformer.") for key in load_file(place.folder / "all.safetensors")
    )


def as_fp8(kind: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """fp8 as published: plain, with ComfyUI's older scales, or its newer ones (here one for each row)."""
    found: dict[str, Tensor] = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)} if kind == "old" else {}
    for key, x in state.items():
        layer = key.removesuffix(".weight")
        if layer == key or x.dim() != 2 or kind == "plain":
            found[key] = x.to(torch.float8_e4m3fn) if kind == "plain" else x
            continue
        top = x.abs().amax(dim=1, keepdim=True) if kind == "new" else x.abs().amax()
        scale = (top / 448).clamp(min=1e-8)
        found[key] = (x / scale).to(torch.float8_e4m3fn)
        if kind == "old":
            found |= {f"{layer}.scale_weight": scale.reshape(()), f"{layer}.scale_input": torch.ones(())}
        else:
            settings = json.dumps({"format": "float8_e4m3fn"}).encode()
            found |= {
                f"{layer}.weight_scale": scale,
                f"{layer}.comfy_quant": torch.tensor(list(settings), dtype=torch.uint8),
            }
    return found


@pytest.mark.parametrize("kind", ["plain", "old", "new"])
def test_fp8_files_are_read_with_their_scales(family_place: Make, small_configs: None, kind: str) -> None:
    place = family_place("flux1")
    wanted = weights(place)
    place.write({"model": split(place, lambda state: as_fp8(kind, state))})
    found = weights(place)
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=0.08, atol=0.08 * float(tensor.abs().max()), msg=key)
    exact = load_file(place.folder / "flux.safetensors")
    rows = exact["double_blocks.0.img_attn.qkv.weight"].float()
    for ending in (".scale_weight", ".weight_scale"):
        if f"double_blocks.0.img_attn.qkv{ending}" in exact:
            rows = rows * exact[f"double_blocks.0.img_attn.qkv{ending}"]
    assert torch.equal(found["transformer_blocks.0.attn.to_k.weight"], rows.chunk(3)[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"img_in.weight_scale": torch.ones(5)},
            r"img_in.weight_scale is F32 \[5\], no scale of img_in.weight \[32, 16\]",
        ),
        ({"img_in.weight_scale": torch.ones(32, dtype=torch.uint8)}, "img_in.weight_scale is U8"),
        (
            {"img_in.weight": torch.ones(32, 16, dtype=torch.int8)},
            "img_in.weight holds I8, packed in a way that is not read here",
        ),
    ],
)
def test_what_is_packed_otherwise_is_refused(
    family_place: Make, small_configs: None, change: dict[str, Tensor], message: str
) -> None:
    place = family_place("flux1")
    place.write({"model": split(place, lambda state: {**state, **change})})
    with pytest.raises(InvalidConfig, match=message):
        prepared(place.file)


def test_the_variant_is_told_by_names(family_place: Make, tmp_path: Path) -> None:
    place = family_place("flux1")

    def variant(**model: Any) -> tuple[str, str]:
        run = prepared(place.write({"model": model}))
        why = next((derived.why for derived in run.derived if derived.key == "model.variant"), "run.toml")
        return run.model.variant, why

    assert variant() == ("dev", "the checkpoint is told guidance, and nothing names Kontext")
    assert variant(variant="kontext") == ("kontext", "run.toml")
    shutil.copytree(place.folder / "model", place.folder / "FLUX.1-Kontext-dev")
    assert variant(checkpoint="FLUX.1-Kontext-dev") == ("kontext", "the checkpoint's name")
    index = place.folder / "model" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "FluxKontextPipeline"}))
    assert variant() == ("kontext", "the checkpoint's model_index.json")
    assert prepared(place.file).spec.defaults.embedded_guidance == 2.5
    with pytest.raises(InvalidConfig, match="is no schnell: its transformer is told guidance"):
        variant(variant="schnell")
    with pytest.raises(InvalidConfig, match=r'family flux1 has no variant "f1"'):
        variant(variant="f1")
    write_tiny(tmp_path / "schnell", guidance_embeds=False)
    assert variant(checkpoint=str(tmp_path / "schnell")) == ("schnell", "the checkpoint is told no guidance")
    assert prepared(place.file).spec.architecture == "flux-1-schnell"


def test_references_are_kontexts(family_place: Make) -> None:
    place = family_place("flux1")
    sources = [{"path": "pics", "control_path": "pics"}]
    place.write({"dataset": {"sources": sources}})
    with pytest.raises(InvalidConfig, match="`control_path` belongs to"):
        prepared(place.file)
    place.write({"sampling": {"prompts": [{"prompt": "x", "control_images": ["pics/0.png"]}]}})
    with pytest.raises(InvalidConfig, match="cannot use `control_images`"):
        prepared(place.file)
    place.write({"model": {"variant": "kontext"}, "dataset": {"sources": sources}})
    items = prepared(place.file).collection.items
    assert {item.sizes for item in items} == {((1024, 1024),)}
    assert {item.layout for item in items} == {"with 1024x1024"}


# --- LoRA -------------------------------------------------------------------------------------------------------------


def full_targets(place: Place, **changes: Any) -> list[Target]:
    run = prepared(place.write(changes))
    parts = {name: replace(part, config=shipped(PARTS[name])) for name, part in run.model.components.items()}
    return run.spec.targets(run.config, replace(run.model, components=parts))


def empty(targets: list[Target]) -> dict[str, Tensor]:
    return {
        f"{target.full_name}.{name}": torch.zeros(shape)
        for target in targets
        for name, shape in adapter_shapes(target).items()
    }


def test_kohyas_keys(family_place: Make) -> None:
    """sd-scripts' default: 304 modules of the blocks and CLIP-L's 72."""
    targets = full_targets(
        family_place("flux1"), network={"rank": 4}, training={"components": {"text_encoder_1": True}}
    )
    ours = {key: tuple(x.shape) for key, x in kohya_state(targets, empty(targets), torch.float16).items()}
    assert ours == listed("kohya_lora_flux1")


@pytest.mark.parametrize(("fixture", "extra"), [("peft_lora_flux1", []), ("peft_lora_flux1_kontext", [r"\.proj_mlp$"])])
def test_diffusers_keys(family_place: Make, fixture: str, extra: list[str]) -> None:
    preset: Any = "diffusers"
    if extra:
        preset = [
            r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2))$",
            *extra,
        ]
    targets = full_targets(family_place("flux1"), network={"rank": 4, "targets": preset})
    ours = {key: tuple(x.shape) for key, x in diffusers_state(targets, empty(targets), torch.float16)[0].items()}
    assert ours == listed(fixture)


def test_the_original_models_lora_gives_its_answer(family_place: Make, tmp_path: Path) -> None:
    """A LoRA of Kohya's names, merged by us into diffusers' class, answers as the original class with it merged."""
    file = load_file(DATA / "flux1_tiny.safetensors")
    state = {key.removeprefix("model."): x for key, x in file.items() if key.startswith("model.")}
    run = prepared(family_place("flux1").file)
    config = {**run.model.components["denoiser"].config, "joint_attention_dim": 12, "pooled_projection_dim": 8}
    model = replace(run.model, components={"denoiser": replace(run.model.components["denoiser"], config=config)})
    save_file(
        {key.removeprefix("lora."): x for key, x in file.items() if key.startswith("lora.")}, tmp_path / "l.safetensors"
    )
    lora = read_lora(tmp_path / "l.safetensors", run.spec.layers(model), 1.0)
    assert not lora.left_out
    module = transformer(config, state)
    merge_into({"denoiser": module}, lora.changes)
    rows, columns = (int(file["img_ids"][:, axis].max()) + 1 for axis in (1, 2))
    x = torch.nn.functional.pixel_shuffle(file["packed_input"].transpose(1, 2).unflatten(2, (rows, columns)), 2)

    def answer(time: float) -> Tensor:
        told = {"hidden": file["text"], "pooled": file["pooled"], "guidance": time * file["guidance"]}
        with torch.no_grad():
            return packed(denoise(module, x, time * file["sigma"], told))

    torch.testing.assert_close(answer(1000), file["output_with_lora"], rtol=1e-4, atol=2e-5 + last_place(answer))


NAMES = {
    "kohya": "lora_unet_double_blocks_0_img_attn_qkv",
    "ai-toolkit": "transformer.transformer_blocks.0.attn.to_q",
    "comfyui": "diffusion_model.double_blocks.0.img_attn.qkv",
    "onetrainer": "lora_transformer_transformer_blocks_0_attn_to_q",
    "lycoris": "lycoris_transformer_blocks_0_attn_to_q",
    "bare": "transformer_blocks.0.attn.to_q",
    "kohya single": "lora_unet_single_blocks_1_linear1",
    "kohya T5": "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
    "onetrainer T5": "lora_te2_encoder_block_0_layer_0_SelfAttention_q",
    "kohya CLIP": "lora_te1_text_model_encoder_layers_0_mlp_fc1",
}


@pytest.mark.parametrize("tool", list(NAMES))
def test_every_tools_names_are_known(family_place: Make, tool: str) -> None:
    from runner.formats.adapter_names import parse

    run = prepared(family_place("flux1").file)
    keys = [f"{NAMES[tool]}.lora_down.weight", f"{NAMES[tool]}.lora_up.weight", f"{NAMES[tool]}.alpha"]
    found = parse(keys, run.spec.layers(run.model))
    assert not found.strange
    assert len(found.modules[0].layers) == {"kohya": 3, "comfyui": 3, "kohya single": 4}.get(tool, 1)
    component = "text_encoder_2" if "T5" in tool else "text_encoder_1" if "CLIP" in tool else "denoiser"
    assert {layer.component for layer in found.modules[0].layers} == {component}


@pytest.mark.parametrize(("form", "targets"), [("kohya", [r"^transformer_blocks\."]), ("diffusers", "default")])
def test_diffusers_pipeline_loads_what_we_publish(family_place: Make, form: str, targets: Any) -> None:
    """The pipeline's own loader takes every layer, and merges to our weights. Its reader of Kohya's single-stream blocks
    knows only those of the full size."""
    from diffusers import FluxPipeline

    publish = [{"format": form, "directory": "out", "mode": "copy"}]
    place = family_place(
        "flux1",
        network={"rank": 2, "alpha": 1.0, "targets": targets},
        training={"max_train_steps": 2, "checkpoints": {"every_n_steps": 2, "dtype": "fp32"}},
        selection={"strategy": "last", "publish": publish},
    )
    applied(place.file)
    file = next((place.folder / "out").rglob("*.safetensors"))
    run = prepared(place.file)
    base = family("flux1").load(run.model, "denoiser", OPTIONS)
    before = {key: x.clone() for key, x in base.state_dict().items()}
    merge_into({"denoiser": base}, read_lora(file, run.spec.layers(run.model), 1.0).changes)
    pipeline: Any = FluxPipeline.from_pretrained(place.folder / "model", local_files_only=True)
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    pipeline.fuse_lora(components=["transformer"])
    pipeline.unload_lora_weights()
    theirs = {key.replace(".base_layer.", "."): x for key, x in pipeline.transformer.state_dict().items()}
    changed = 0
    for key, tensor in base.state_dict().items():
        torch.testing.assert_close(theirs[key], tensor, rtol=1e-5, atol=1e-6, msg=key)
        changed += not torch.equal(before[key], tensor)
    assert changed == len(run.targets)


def test_comfyui_layers_differ_in_the_norms_alone() -> None:
    config = shipped(PARTS["denoiser"])
    pairs = zip(flux_layers(config), comfyui_layers(config), strict=True)
    assert {ours.kind for ours, theirs in pairs if ours != theirs} == {"norm"}
