"""Weights in and out: the real key lists, and every direction of a LoRA proved by merged weights with an independent reader."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runner.errors import Invalid, RunFailed
from runner.families.contract import LoadOptions
from runner.families.parts.files import CONFIGS, read_json
from runner.families.parts.match import match_part
from runner.families.parts.modules import make_module
from runner.families.parts.part import Part
from runner.families.registry import family
from runner.families.sd.spec import SD15_FINDER, SDXL_FINDER
from runner.families.sd3.spec import FINDER as SD3_FINDER
from runner.formats.adapter_read import read_adapters
from runner.formats.adapter_write import diffusers_state, kohya_state
from runner.model.layers import count, original_parameters, parameters
from runner.model.targets import Target
from runner.networks.attach import Dropouts, attach
from runner.networks.merge import merged
from runner.networks.shapes import adapter_shapes, count_parameters
from runner.weights.headers import read_header
from runner.weights.tensors import read_tensors, write_hashed_tensors, write_tensors
from tests.full_size import sd15_state
from tests.inprocess import applied, prepared
from tests.support import DATA, Place

FINDERS = {finder.family: finder for finder in (SD15_FINDER, SDXL_FINDER, SD3_FINDER)}
KEY_LISTS = {"sd15": "checkpoint_sd15_keys", "sdxl": "checkpoint_sdxl_keys", "sd3": "checkpoint_sd3_medium_keys"}
EXTRAS = ("position_ids", "logit_scale", "t5xxl.transformer.encoder.embed_tokens.weight")
"""Keys of real checkpoints that hold nothing of their own."""
PARTS = [(family, part) for family, finder in FINDERS.items() for part in finder.parts]


def shipped(finder_family: str, part: Part) -> dict[str, Any]:
    return read_json(CONFIGS / finder_family / part.folder / "config.json")


# --- architecture -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "part"), PARTS, ids=lambda value: getattr(value, "name", value))
@pytest.mark.parametrize("size", ["full", "tiny"])
def test_the_described_layers_are_those_of_the_classes(name: str, part: Part, size: str, tmp_path: Path) -> None:
    if size == "tiny":
        family(name).tiny(tmp_path)
    config = shipped(name, part) if size == "full" else read_json(tmp_path / part.folder / "config.json")
    with torch.device("meta"):
        module = make_module(part.module, config)
    left_out = ("position_ids", "encoder.embed_tokens.weight")
    own = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items() if not key.endswith(left_out)}
    assert parameters(part.module.layers(config)) == own
    assert count(part.module.layers(config)) == sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", KEY_LISTS)
def test_original_names_are_those_of_the_real_checkpoint(name: str) -> None:
    listed = json.loads((DATA / f"{KEY_LISTS[name]}.json").read_text())
    real = {key: tuple(shape) for key, shape in listed.items() if not key.endswith(EXTRAS)}
    ours: dict[str, tuple[int, ...]] = {}
    for part in FINDERS[name].parts:
        ours |= original_parameters((part.saved.layers or part.module.layers)(shipped(name, part)), part.saved.prefix)
    assert ours == real


def full_targets(place: Place, name: str, network: dict[str, Any], encoders: int) -> list[Target]:
    """The targets of a full-size model, from the description alone."""
    family(name).tiny(place.folder / name)
    components = {f"text_encoder_{number + 1}": True for number in range(encoders)}
    place.write(
        {
            "model": {"family": name, "checkpoint": name},
            "network": {"rank": 4, **network},
            "training": {"components": components},
        }
    )
    run = prepared(place.file)
    parts = {part.name: part for part in FINDERS[name].parts}
    full = {key: replace(part, config=shipped(name, parts[key])) for key, part in run.model.components.items()}
    return run.spec.targets(run.config, replace(run.model, components=full))


def empty_state(targets: list[Target]) -> dict[str, Tensor]:
    """Tensors of the adapters' shapes without numbers."""
    state: dict[str, Tensor] = {}
    owners: set[str] = set()
    for target in targets:
        for name, shape in adapter_shapes(target).items():
            if target.tied and name == "lora_A":
                if target.kohya in owners:
                    continue
                owners.add(target.kohya)
            state[f"{target.full_name}.{name}"] = torch.zeros(shape)
    return state


@pytest.mark.parametrize(
    ("fixture", "name", "network", "encoders"),
    [
        ("kohya_lora_sd15", "sd15", {}, 1),
        ("kohya_lora_sd15_conv", "sd15", {"conv_rank": 4}, 1),
        ("kohya_lora_sdxl", "sdxl", {}, 2),
        ("kohya_lora_sd3", "sd3", {}, 2),
        ("kohya_lora_sd3_t5", "sd3", {}, 3),
    ],
)
def test_kohyas_keys(place: Place, fixture: str, name: str, network: dict[str, Any], encoders: int) -> None:
    """The keys and shapes of a full-size LoRA, from the description alone."""
    targets = full_targets(place, name, network, encoders)
    ours = {
        key: list(tensor.shape) for key, tensor in kohya_state(targets, empty_state(targets), torch.float16).items()
    }
    assert ours == json.loads((DATA / f"{fixture}.json").read_text())


def test_diffusers_targets_of_sd3(place: Place) -> None:
    """The preset of diffusers' training script: 191 layers, 9,388,032 parameters at rank 16."""
    targets = full_targets(place, "sd3", {"targets": "attention", "rank": 16}, 0)
    assert len(targets) == 191
    assert count_parameters(targets) == 9_388_032


# --- LoRA files -------------------------------------------------------------------------------------------------------

ADAPTED = {
    "network": {
        "rank": 4,
        "alpha": 2.0,
        "conv_rank": 3,
        "conv_alpha": 1.5,
        "rank_pattern": {"attn2": 2},
        "alpha_pattern": {r"ff\.net": 1.0},
    },
    "training": {"components": {"text_encoder_1": True}},
}


@pytest.fixture
def adapters(place: Place) -> tuple[Place, list[Target], dict[str, Tensor]]:
    """The tiny model's targets with random adapters."""
    place.write(ADAPTED)
    run = prepared(place.file)
    modules = {name: load_module(run, name) for name in ("denoiser", "text_encoder_1")}
    state = {
        name: parameter.detach().clone() for name, parameter in attach(modules, run.targets, Dropouts(), -1, 1).items()
    }
    generator = torch.Generator().manual_seed(5)
    for name in state:
        state[name] = torch.randn(state[name].shape, generator=generator) * 0.1
    return place, run.targets, state


def load_module(run: Any, name: str) -> nn.Module:
    return family("sd15").load(
        run.model,
        name,
        LoadOptions(dtype=torch.float32, device=torch.device("cpu"), attention="sdpa", scratch_seed=None),
    )


def merged_by_us(
    place: Place, targets: list[Target], state: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    run = prepared(place.file)
    base = {name: dict(load_module(run, name).state_dict()) for name in ("denoiser", "text_encoder_1")}
    result = merged(targets, state, base)
    return result["denoiser"], result["text_encoder_1"]


def merged_by_diffusers(place: Place, file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        place.folder / "model", safety_checker=None, local_files_only=True
    )
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return dict(pipeline.unet.state_dict()), dict(pipeline.text_encoder.state_dict())


def assert_equal_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    theirs = {key.replace(".base_layer.", "."): tensor for key, tensor in theirs.items() if ".lora_" not in key}
    assert set(ours) == set(theirs)
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-5, atol=1e-6, msg=key)
    assert sum(not torch.equal(base[key], tensor) for key, tensor in ours.items()) >= 10


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_diffusers_reads_what_we_write(adapters: Any, tmp_path: Path, form: str) -> None:
    place, targets, state = adapters
    file = tmp_path / "lora.safetensors"
    if form == "kohya":
        write_hashed_tensors(file, kohya_state(targets, state, torch.float32), {"ss_network_dim": "4"})
    else:
        write_tensors(file, *diffusers_state(targets, state, torch.float32))
    ours, theirs = merged_by_us(place, targets, state), merged_by_diffusers(place, file)
    run = prepared(place.file)
    for index, name in enumerate(("denoiser", "text_encoder_1")):
        assert_equal_weights(ours[index], theirs[index], dict(load_module(run, name).state_dict()))


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_we_read_what_we_write(adapters: Any, tmp_path: Path, form: str) -> None:
    _, targets, state = adapters
    file = tmp_path / "lora.safetensors"
    if form == "kohya":
        write_hashed_tensors(file, kohya_state(targets, state, torch.float32), {})
    else:
        write_tensors(file, *diffusers_state(targets, state, torch.float32))
    again = read_adapters(file, targets)
    assert set(again) == set(state)
    for name, tensor in state.items():
        torch.testing.assert_close(again[name], tensor, msg=name)


def test_we_read_what_diffusers_writes(adapters: Any, tmp_path: Path) -> None:
    """peft's own adapters with alpha unequal to rank, saved by diffusers with and without its metadata."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    place, _, _ = adapters
    place.write({"network": {"rank": 4, "alpha": 4.0, "targets": "attention"}})
    targets = prepared(place.file).targets
    pipeline = StableDiffusionPipeline.from_pretrained(
        place.folder / "model", safety_checker=None, local_files_only=True
    )
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    torch.manual_seed(3)
    pipeline.unet.add_adapter(config)
    for alpha, metadata in ((8.0, config.to_dict()), (4.0, None)):
        folder = tmp_path / str(alpha)
        pipeline.save_lora_weights(
            folder, unet_lora_layers=get_peft_model_state_dict(pipeline.unet), unet_lora_adapter_metadata=metadata
        )
        state = read_adapters(folder / "pytorch_lora_weights.safetensors", targets)
        ours = merged_by_us(place, targets, state)[0]
        layer: Any = pipeline.unet.get_submodule(targets[0].name)
        wanted = layer.weight + layer.lora_B["default"].weight @ layer.lora_A["default"].weight * (alpha / 4)
        torch.testing.assert_close(ours[f"{targets[0].name}.weight"], wanted.detach())


def test_a_run_starts_from_either_format(adapters: Any, tmp_path: Path) -> None:
    """`network.init_from`: both files give the same first loss, and another one than a fresh adapter's."""
    place, targets, state = adapters
    write_hashed_tensors(place.folder / "k.safetensors", kohya_state(targets, state, torch.float32), {})
    write_tensors(place.folder / "d.safetensors", *diffusers_state(targets, state, torch.float32))
    losses = {}
    for name in ("k.safetensors", "d.safetensors", None):
        network = {**ADAPTED["network"], **({"init_from": name} if name else {})}
        place.write(
            {
                **ADAPTED,
                "network": network,
                "training": {**ADAPTED["training"], "max_train_steps": 1},
                "run": {"name": str(name)},
            }
        )
        applied(place.file, until="train")
        events = (place.folder / "runs" / str(name) / "logs" / "events.jsonl").read_text().splitlines()
        losses[name] = next(json.loads(line)["loss"] for line in events if '"step"' in line and '"loss"' in line)
    assert losses["k.safetensors"] == pytest.approx(losses["d.safetensors"], rel=1e-5)
    assert abs(losses["k.safetensors"] - losses[None]) > 1e-4


def test_adapter_files_that_do_not_fit_are_refused(adapters: Any, tmp_path: Path) -> None:
    _, targets, state = adapters
    good = kohya_state(targets, state, torch.float32)
    first = targets[0].kohya
    cases = {
        "it holds no LoRA layers": {"weight": torch.zeros(2)},
        "of its layers get no adapter here (lora_unet_other)": {
            **good,
            "lora_unet_other.lora_down.weight": torch.zeros(4, 4),
        },
        "layers that get adapters are not in it": {
            key: value for key, value in good.items() if not key.startswith(first)
        },
        f"{first}.lora_down.weight has rank 5, [network] gives this layer 3": {
            **good,
            f"{first}.lora_down.weight": torch.zeros(5, targets[0].inputs, 1, 1),
        },
        "1 of its tensors are not known here (x.glora_a)": {**good, "x.glora_a": torch.zeros(3)},
        "has lora_B [7, 4, 1, 1], which must be [16, 3]": {**good, f"{first}.lora_up.weight": torch.zeros(7, 4, 1, 1)},
        f"{first} has no lora_B": {key: value for key, value in good.items() if key != f"{first}.lora_up.weight"},
    }
    for message, tensors in cases.items():
        write_tensors(tmp_path / "bad.safetensors", tensors)
        with pytest.raises(Invalid) as caught:
            read_adapters(tmp_path / "bad.safetensors", targets)
        assert message in str(caught.value)


# --- whole models -----------------------------------------------------------------------------------------------------


def test_a_full_fine_tune_is_written_in_every_layout_and_read_back(place: Place) -> None:
    """diffusers' own loader and ours give the trained weights again from the directory and from the single file."""
    from diffusers import UNet2DConditionModel

    publish = [
        {"format": form, "directory": f"out/{form}", "mode": "copy"} for form in ("diffusers", "single_file", "comfyui")
    ]
    place.write(
        {
            "network": None,
            "training": {"max_train_steps": 2, "checkpoints": {"every_n_steps": 2, "dtype": "fp32"}},
            "selection": {"strategy": "last", "publish": publish},
        }
    )
    outcome = applied(place.file)
    run = prepared(place.file)
    checkpoint = run.store.artifact("train", outcome.graph.fingerprint("train")) / "checkpoints" / "step-00000002"
    trained = read_tensors(
        checkpoint / "raw.safetensors", {k: k for k in read_header(checkpoint / "raw.safetensors").tensors}, None
    )
    folder = next((place.folder / "out" / "diffusers").iterdir())
    theirs = UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True).state_dict()
    assert {f"denoiser.{key}" for key in theirs} == set(trained)
    assert all(torch.equal(trained[f"denoiser.{key}"], tensor) for key, tensor in theirs.items())
    single = next((place.folder / "out" / "single_file").glob("*.safetensors"))
    denoiser = SD15_FINDER.parts[0]
    for file, prefix in (
        (single, "model.diffusion_model."),
        (next((place.folder / "out" / "comfyui").glob("*.safetensors")), ""),
    ):
        header = read_header(file)
        assert all(key.startswith(prefix) for key in header.tensors if "time_embed" in key)
        match = match_part(denoiser, run.model.components["denoiser"].config, header.tensors)
        again = read_tensors(file, {origin.key: name for name, origin in match.keys.items()}, None)
        assert all(torch.equal(trained[f"denoiser.{key}"], tensor) for key, tensor in again.items())


def test_safetensors_that_lie_are_refused(tmp_path: Path) -> None:
    import struct

    def write(header: dict[str, Any], data: bytes) -> Path:
        encoded = json.dumps(header).encode()
        file = tmp_path / "x.safetensors"
        file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
        return file

    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    assert read_header(write({"a": entry}, b"0" * 16)).tensors == {"a": ("F32", (4,))}
    for header, part in (
        ({"a": {**entry, "data_offsets": [0, 8]}}, "malformed"),
        ({"a": {**entry, "shape": [-4]}}, "malformed"),
        ({"a": {"dtype": "F32"}}, "malformed"),
        ({"a": {**entry, "shape": [8], "data_offsets": [0, 32]}}, "cut off: its tensors need 32 bytes, it has 16"),
    ):
        with pytest.raises(Invalid, match=part):
            read_header(write(header, b"0" * 16))
    for content, part in (
        (b"abc", "it has 3 bytes"),
        (b"\xff" * 64, "its header would have"),
        (struct.pack("<Q", 4) + b"nope", "is not JSON"),
    ):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(Invalid, match=part):
            read_header(tmp_path / "x.safetensors")


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path: Path) -> None:
    """A pickle that would run something is neither opened by planning nor by loading."""
    import os

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'pwned'}",)

    torch.save({"state_dict": {"a": torch.zeros(2), "b": Evil()}}, tmp_path / "evil.ckpt")
    with pytest.raises(Invalid):
        read_header(tmp_path / "evil.ckpt")
    with pytest.raises(RunFailed):
        read_tensors(tmp_path / "evil.ckpt", {"a": "a"}, None)
    assert not (tmp_path / "pwned").exists()


def test_the_header_of_a_pickle_is_that_of_its_tensors(tmp_path: Path) -> None:
    state = {"a.weight": torch.zeros(3, 4), "b": torch.zeros(2, dtype=torch.float16), "n": torch.tensor(3)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "x.ckpt")
    assert read_header(tmp_path / "x.ckpt").tensors == {
        "a.weight": ("F32", (3, 4)),
        "b": ("F16", (2,)),
        "n": ("I64", ()),
    }


# --- full size --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "extras"), [(".safetensors", False), (".safetensors", True), (".ckpt", True)])
def test_full_size_files_load_and_train(place: Place, suffix: str, extras: bool) -> None:
    """A random file of exactly the real keys, and with the usual extras, trains three steps at 256 pixels."""
    from tests.full_size import write_sd15
    from tests.support import draw_pictures

    write_sd15(place.folder / f"sd15{suffix}", extras)
    draw_pictures(place.folder / "big", 4, size=256)
    place.write(
        {
            "model": {"checkpoint": f"sd15{suffix}", "dtype": "fp32"},
            "dataset": {"resolution": 256, "batch_size": 1, "held_out": None, "sources": [{"path": "big"}]},
            "training": {"max_train_steps": 3, "checkpoints": {"every_n_steps": 3}},
        }
    )
    place.run("apply", "run.toml", "--target", "train").ok()
    events = [json.loads(line) for line in (place.output / "logs" / "events.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["type"] == "step"]
    assert len(losses) == 3
    assert all(0 < loss < 10 for loss in losses)


@pytest.mark.slow
def test_full_size_weights_arrive_unchanged(tmp_path: Path) -> None:
    """Every tensor of the single file is found in a module, equal to the byte; the pipeline of diffusers agrees."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    state = sd15_state()
    file = tmp_path / "sd15.safetensors"
    write_tensors(file, state)
    config = read_json(CONFIGS / "sd15" / "unet" / "config.json")
    match = match_part(SD15_FINDER.parts[0], config, read_header(file).tensors)
    ours = read_tensors(file, {origin.key: name for name, origin in match.keys.items()}, None)
    theirs = convert_ldm_unet_checkpoint(dict(state), {**config, "class_embed_type": None})
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key].reshape(theirs[key].shape), theirs[key]) for key in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_full_size_models_load_and_train(place: Place, name: str) -> None:
    """A random file of exactly the real keys (SD3 without T5) trains two steps of a LoRA at 256 pixels in bf16."""
    from tests.full_size import write_full
    from tests.support import draw_pictures

    write_full(place.folder / f"{name}.safetensors", name, ("t5xxl",) if name == "sd3" else ())
    draw_pictures(place.folder / "big", 2, size=256)
    place.write(
        {
            "model": {"family": name, "checkpoint": f"{name}.safetensors", "dtype": "bf16"},
            "dataset": {"resolution": 256, "batch_size": 1, "held_out": None, "sources": [{"path": "big"}]},
            "training": {
                "max_train_steps": 2,
                "checkpoints": {"every_n_steps": 2},
                "memory": {"gradient_checkpointing": True},
            },
        }
    )
    place.run("apply", "run.toml", "--target", "train").ok()
    events = [json.loads(line) for line in (place.output / "logs" / "events.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["type"] == "step"]
    assert len(losses) == 2
    assert all(0 < loss < 20 for loss in losses)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_full_size_keys_fit_the_modules_strictly(tmp_path: Path, name: str) -> None:
    """On the meta device: every tensor of the real key list goes to a tensor of the module's shape, and none is left."""
    from runner.families.parts.load import from_origin
    from tests.stand_in import write_stand_in

    header = read_header(write_stand_in(tmp_path / "x.safetensors", name))
    used: set[str] = set()
    for part in FINDERS[name].parts:
        config = shipped(name, part)
        match = match_part(part, config, header.tensors)
        assert match.problem is None
        with torch.device("meta"):
            module = make_module(part.module, config)
            state = module.state_dict()
            for key, origin in match.keys.items():
                tensor = from_origin(torch.empty(header.tensors[origin.key][1]), origin)
                assert tensor.numel() == state[key].numel(), key
                used.add(origin.key)
        assert set(match.keys) == {
            key for key in state if not key.endswith(("position_ids", "encoder.embed_tokens.weight"))
        }
    assert {key for key in header.tensors if not key.endswith(EXTRAS)} == used
