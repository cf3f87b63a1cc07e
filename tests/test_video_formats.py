"""LoRA files of HunyuanVideo and FramePack: musubi-tuner's, diffusers' and diffusion-pipe's names, and each other's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from runner.errors import Invalid, InvalidConfig
from runner.families.contract import LoadOptions
from runner.families.parts.files import CONFIGS
from runner.families.registry import family
from runner.formats.adapter_read import read_adapters, read_lora
from runner.formats.adapter_write import diffusers_state, kohya_state
from runner.model.targets import Target
from runner.networks.attach import Dropouts, attach
from runner.networks.merge import merge_into, merged
from runner.plan.prepare import Prepared
from runner.weights.tensors import write_tensors
from tests.adapters import merged_file
from tests.inprocess import prepared
from tests.support import DATA, Place
from tests.test_formats import empty_state

Make = Callable[..., Place]
FIXTURES = {"hunyuan_video": ("lora_hunyuan_keys", 240, 440), "framepack": ("lora_framepack_keys", 440, 440)}


def full_targets(place: Place, name: str, **network: Any) -> list[Target]:
    """The targets of a full-size model, from the description alone."""
    place.write({"network": {"rank": 4, **network}})
    run = prepared(place.file)
    denoiser = run.model.components["denoiser"]
    config = json.loads((CONFIGS / name / "transformer" / "config.json").read_text())
    parts = {**run.model.components, "denoiser": replace(denoiser, config=config)}
    return run.spec.targets(run.config, replace(run.model, components=parts))


@pytest.mark.parametrize("name", list(FIXTURES))
def test_musubis_keys(family_place: Make, name: str) -> None:
    fixture, modules, layers = FIXTURES[name]
    targets = full_targets(family_place(name), name)
    assert len(targets) == layers
    ours = {key: list(x.shape) for key, x in kohya_state(targets, empty_state(targets), torch.float16).items()}
    assert ours == json.loads((DATA / f"{fixture}.json").read_text())["keys"]
    assert len(ours) == 3 * modules


def adapted(place: Place, **network: Any) -> tuple[Prepared, dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """(run, random adapter, the denoiser's weights)."""
    place.write({"network": {"rank": 2, "alpha": 1.0, **network}})
    run = prepared(place.file)
    module = family(run.spec.name).load(
        run.model, "denoiser", LoadOptions(dtype=torch.float32, device=torch.device("cpu"))
    )
    base = {"denoiser": {key: x.clone() for key, x in module.state_dict().items()}}
    state = {key: x.detach().clone() for key, x in attach({"denoiser": module}, run.targets, Dropouts(), -1, 1).items()}
    generator = torch.Generator().manual_seed(5)
    return run, {key: x + 0.1 * torch.randn(x.shape, generator=generator) for key, x in state.items()}, base


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(FIXTURES))
@pytest.mark.parametrize("form", ["musubi", "diffusers", "diffusion_pipe"])
def test_files_are_read_back_by_merged_weights(family_place: Make, tmp_path: Path, name: str, form: str) -> None:
    run, state, base = adapted(family_place(name))
    expected = merged(run.targets, state, base)["denoiser"]
    file = tmp_path / "x.safetensors"
    if form == "diffusers":
        write_tensors(file, *diffusers_state(run.targets, state, torch.float32))
    else:
        tensors = kohya_state(run.targets, state, torch.float32)
        if form == "diffusion_pipe":
            tensors = as_diffusion_pipe(run, tensors)
        write_tensors(file, tensors)
    close(merged_file(run, file)["denoiser"], expected)
    if form == "musubi":
        again = read_adapters(file, run.targets)
        assert set(again) == set(state)
        assert all(torch.allclose(again[key], state[key], atol=1e-6) for key in state)


def as_diffusion_pipe(run: Prepared, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same file with diffusion-pipe's names: original paths with dots, lora_A and lora_B, no alpha."""
    from runner.families.hunyuan_video.architecture import hunyuan_layers

    dotted = {
        f"lora_unet_{layer.original.replace('.', '_')}": layer.original
        for layer in hunyuan_layers(run.model.components["denoiser"].config)
    }
    dotted |= {target.kohya: target.name for target in run.targets if target.kohya not in dotted}
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, _, rest = key.partition(".")
        name = f"diffusion_model.{dotted[module]}"
        if rest == "lora_down.weight":
            found[f"{name}.lora_A.weight"] = tensor
        elif rest == "lora_up.weight":
            rank = tensors[f"{module}.lora_down.weight"].shape[0]
            found[f"{name}.lora_B.weight"] = tensor * (float(tensors[f"{module}.alpha"]) / rank)
    return found


def test_diffusers_own_class_loads_ours(family_place: Make, tmp_path: Path) -> None:
    """An independent reader: diffusers puts the adapter of a diffusers file on its own transformer."""
    from diffusers import HunyuanVideoTransformer3DModel

    place = family_place("hunyuan_video")
    run, state, base = adapted(place)
    tensors, metadata = diffusers_state(run.targets, state, torch.float32)
    write_tensors(tmp_path / "x.safetensors", tensors, metadata)
    theirs: Any = HunyuanVideoTransformer3DModel.from_pretrained(
        place.folder / "model" / "transformer", local_files_only=True
    )
    own = {key.removeprefix("transformer."): x for key, x in load_file(tmp_path / "x.safetensors").items()}
    settings = {
        key.removeprefix("transformer."): value for key, value in json.loads(metadata["lora_adapter_metadata"]).items()
    }
    theirs.load_lora_adapter(own, prefix=None, metadata=settings)
    expected = merged(run.targets, state, base)["denoiser"]
    theirs.fuse_lora()
    theirs.unload_lora()
    close(dict(theirs.state_dict()), expected)


@pytest.mark.parametrize(("trained", "used"), [("framepack", "hunyuan_video"), ("hunyuan_video", "framepack")])
def test_one_familys_lora_merges_into_the_other(family_place: Make, tmp_path: Path, trained: str, used: str) -> None:
    """Both have the same blocks: the weights change by the same differences."""
    run, state, base = adapted(family_place(trained))
    file = tmp_path / "x.safetensors"
    write_tensors(file, kohya_state(run.targets, state, torch.float32))
    changed = merged(run.targets, state, base)["denoiser"]
    other = prepared(family_place(used).file)
    module = family(used).load(other.model, "denoiser", LoadOptions(dtype=torch.float32, device=torch.device("cpu")))
    before = {key: x.clone() for key, x in module.state_dict().items()}
    lora = read_lora(file, other.spec.layers(other.model), 1.0)
    assert len({layer.full_name for change in lora.changes for layer in change.pieces}) == len(run.targets)
    merge_into({"denoiser": module}, lora.changes)
    for key, after in module.state_dict().items():
        difference = changed[key] - base["denoiser"][key] if key in changed else torch.zeros_like(after)
        torch.testing.assert_close(after - before[key], difference, rtol=1e-4, atol=1e-5)


def test_a_framepack_lora_cannot_start_hunyuan_videos(family_place: Make, tmp_path: Path) -> None:
    """Training shares the first factor of q, k and v, which a FramePack file does not."""
    run, state, _ = adapted(family_place("framepack"))
    place = family_place("hunyuan_video")
    write_tensors(place.folder / "fp.safetensors", kohya_state(run.targets, state, torch.float32))
    place.write({"network": {"rank": 2, "alpha": 1.0, "init_from": "fp.safetensors"}})
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.file)
    text = "\n".join(item.render() for item in caught.value.diagnostics)
    assert "fp.safetensors does not fit" in text
    assert "init_from" in text
    place.write({"network": {"rank": 2, "base_weights": ["fp.safetensors:0.5"]}})
    assert prepared(place.file).base_weights[0][1] == 0.5, "merged first, the maths allows it"


def test_a_file_of_another_model_is_refused(family_place: Make, tmp_path: Path) -> None:
    run = prepared(family_place("framepack").file)
    write_tensors(tmp_path / "x.safetensors", {"lora_unet_input_blocks_1.lora_down.weight": torch.zeros(2, 3)})
    with pytest.raises(Invalid, match="none of its 1 layers belongs to this model"):
        read_lora(tmp_path / "x.safetensors", run.spec.layers(run.model), 1.0)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def states(run: Prepared) -> dict[str, dict[str, Tensor]]:
    bundle = family(run.spec.name)
    options = LoadOptions(dtype=torch.float32, device=torch.device("cpu"))
    return {name: dict(bundle.load(run.model, name, options).state_dict()) for name in run.model.components}


def as_single_files(name: str, found: dict[str, dict[str, Tensor]], folder: Path) -> dict[str, str]:
    """The files that people have, with the names inside that they have there; the keys of [model] for them."""
    from runner.families.hunyuan_video.spec import FINDER
    from runner.families.parts.save import original_component

    folder.mkdir()
    if name == "hunyuan_video":
        part = FINDER.parts[0]
        original = original_component(part, as_single_files.model, found["denoiser"], part.saved)  # type: ignore[attr-defined]
        torch.save({"module": original}, folder / "mp_rank_00_model_states.pt")
        write_tensors(folder / "flat.safetensors", original)
        torch.save({"state_dict": {f"vae.{key}": x for key, x in found["vae"].items()}}, folder / "vae.pt")
        checkpoint = "files/mp_rank_00_model_states.pt"
    else:
        keys = sorted(found["denoiser"])
        for number in range(3):
            own = {key: found["denoiser"][key] for key in keys[number::3]}
            write_tensors(folder / f"diffusion_pytorch_model-{number + 1:05d}-of-00003.safetensors", own)
        torch.save(found["vae"], folder / "vae.pt")
        checkpoint = "files/diffusion_pytorch_model-00001-of-00003.safetensors"
    llama = {f"model.{key}": x for key, x in found["text_encoder_1"].items()}
    write_tensors(folder / "llama.safetensors", {**llama, "lm_head.weight": torch.zeros(3, 2)})
    write_tensors(folder / "clip.safetensors", {f"text_model.{key}": x for key, x in found["text_encoder_2"].items()})
    given = {
        "checkpoint": checkpoint,
        "vae": "files/vae.pt",
        "text_encoder_1": "files/llama.safetensors",
        "tokenizer_1": "model/tokenizer",
        "text_encoder_2": "files/clip.safetensors",
        "tokenizer_2": "model/tokenizer_2",
    }
    if name == "framepack":
        vision = {f"vision_model.{key}": x for key, x in found["image_encoder"].items()}
        write_tensors(folder / "siglip.safetensors", {**vision, "vision_model.head.probe": torch.zeros(1, 1, 3)})
        given["image_encoder"] = "files/siglip.safetensors"
    return given


@pytest.mark.parametrize("name", list(FIXTURES))
def test_single_files_hold_the_same_model(family_place: Make, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """.pt under `module` and `state_dict`, flat safetensors, shards; LLaMA, CLIP and SigLIP as ComfyUI's files."""
    module = __import__(f"runner.families.{name}.spec", fromlist=["FINDER"])
    place = family_place(name)
    run = prepared(place.file)
    expected = states(run)
    as_single_files.model = run.model  # type: ignore[attr-defined]
    given = as_single_files(name, expected, place.folder / "files")
    monkeypatch.setattr(module, "FINDER", replace(module.FINDER, shipped=place.folder / "model"))
    checkpoints = [given["checkpoint"]] + ["files/flat.safetensors"] * (name == "hunyuan_video")
    for checkpoint in checkpoints:
        place.write({"model": {**given, "checkpoint": checkpoint}})
        found = states(prepared(place.file))
        assert set(found) == set(expected)
        for part, tensors in expected.items():
            assert all(torch.equal(found[part][key], tensor) for key, tensor in tensors.items()), part
    if name == "framepack":
        (place.folder / "files" / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
        with pytest.raises(InvalidConfig) as caught:
            prepared(place.file)
        assert "the shard diffusion_pytorch_model-00002-of-00003.safetensors of" in caught.value.diagnostics[0].render()


@pytest.mark.parametrize("name", list(FIXTURES))
def test_a_transformers_own_folder_is_a_checkpoint(family_place: Make, name: str) -> None:
    """As FramePack is published: the folder of the transformer, the rest from a snapshot of HunyuanVideo."""
    place = family_place(name)
    expected = states(prepared(place.file))["denoiser"]
    rest = dict.fromkeys(("vae", "text_encoder_1", "text_encoder_2"), "model")
    rest |= {"image_encoder": "model"} if name == "framepack" else {}
    place.write({"model": {"checkpoint": "model/transformer", **rest}})
    run = prepared(place.file)
    found = states(run)["denoiser"]
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert run.model.tokenizers["text_encoder_1"] == place.folder / "model" / "tokenizer"


@pytest.mark.parametrize(
    ("used", "given"), [("hunyuan_video", "framepack"), ("framepack", "hunyuan_video"), ("sd15", "framepack")]
)
def test_another_familys_checkpoint_is_named(family_place: Make, tmp_path: Path, used: str, given: str) -> None:
    family(given).tiny(tmp_path / "other")
    place = family_place(used)
    file = next((tmp_path / "other" / "transformer").glob("*.safetensors"))
    place.write({"model": {"checkpoint": str(file)}})
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.file)
    text = "\n".join(item.render() for item in caught.value.diagnostics)
    assert f"a {'FramePack' if given == 'framepack' else 'HunyuanVideo'} transformer" in text
    assert f'set family = "{given}"' in text
