"""What is exported, loaded by diffusers and peft themselves: their weights are ours, with the metadata and without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from runner.families.contract import LoadOptions
from runner.families.registry import family
from runner.formats.adapter_names import ADAPTER_METADATA
from runner.formats.adapter_write import diffusers_state, kohya_state
from runner.networks.attach import Dropouts, attach
from runner.networks.merge import merged
from runner.plan.prepare import Prepared
from runner.weights.tensors import write_tensors
from tests.inprocess import prepared
from tests.support import Place

Make = Callable[..., Place]
States = dict[str, dict[str, Tensor]]
OPTIONS = LoadOptions(dtype=torch.float32, device=torch.device("cpu"))
FAMILIES = ["sd15", "sdxl", "sd3", "hunyuan_video", "framepack", "flux1", "chroma"]
SCALES: dict[str, dict[str, Any]] = {
    "alpha": {"alpha": 1.0},
    "patterns": {"alpha": 3.0, "alpha_pattern": {"to_q": 0.5}, "rank_pattern": {"to_k": 4}},
    "rslora": {"alpha": 1.0, "rslora": True, "rank_pattern": {"to_v": 3}},
}


def trained(place: Place, encoders: int = 0, **network: Any) -> tuple[Prepared, dict[str, Tensor], States, States]:
    """(run, its adapter's tensors, the weights, the weights with the adapter merged)."""
    components = {f"text_encoder_{number}": True for number in range(1, encoders + 1)}
    run = prepared(place.write({"network": {"rank": 2, **network}, "training": {"components": components}}))
    bundle = family(run.spec.name)
    modules = {name: bundle.load(run.model, name, OPTIONS) for name in ("denoiser", *components)}
    base = {name: {key: x.clone() for key, x in module.state_dict().items()} for name, module in modules.items()}
    generator = torch.Generator().manual_seed(5)
    attached = attach(modules, run.targets, Dropouts(), -1, 1)
    state = {key: x.detach() + 0.1 * torch.randn(x.shape, generator=generator) for key, x in attached.items()}
    return run, state, base, merged(run.targets, state, base)


def close(found: dict[str, Tensor], expected: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    found = {key.replace(".base_layer.", ".").removeprefix("text_model."): x for key, x in found.items()}
    changed = 0
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key.removeprefix("text_model.")], tensor, rtol=1e-5, atol=1e-5, msg=key)
        changed += not torch.equal(tensor, base[key])
    assert changed >= 5


@pytest.mark.parametrize("scale", list(SCALES))
@pytest.mark.parametrize("name", FAMILIES)
def test_the_scale_is_in_the_tensors(family_place: Make, name: str, scale: str) -> None:
    """Any reader that adds B @ A is right; the metadata says alpha = rank."""
    run, state, base, expected = trained(family_place(name), **SCALES[scale])
    tensors, metadata = diffusers_state(run.targets, state, torch.float32)
    for target in run.targets:
        weight = base[target.component][f"{target.name}.weight"]
        up, down = tensors[f"{target.diffusers}.lora_B.weight"], tensors[f"{target.diffusers}.lora_A.weight"]
        found = weight.flatten(1) + up.flatten(1) @ down.flatten(1)
        wanted = expected[target.component][f"{target.name}.weight"].flatten(1)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    settings = json.loads(metadata[ADAPTER_METADATA])
    root = run.targets[0].diffusers.partition(".")[0]
    assert settings[f"{root}.lora_alpha"] == settings[f"{root}.r"]
    assert settings[f"{root}.alpha_pattern"] == settings[f"{root}.rank_pattern"]


PIPELINES = {"sdxl": "StableDiffusionXLPipeline", "sd3": "StableDiffusion3Pipeline"}


@pytest.mark.parametrize("kept", [True, False], ids=["metadata", "no metadata"])
@pytest.mark.parametrize("name", list(PIPELINES))
def test_pipelines_load_the_denoiser_and_both_text_encoders(
    family_place: Make, tmp_path: Path, name: str, kept: bool
) -> None:
    place = family_place(name)
    run, state, base, expected = trained(place, 2, **SCALES["patterns"] if kept else SCALES["alpha"])
    tensors, metadata = diffusers_state(run.targets, state, torch.float32)
    write_tensors(tmp_path / "x.safetensors", tensors, metadata if kept else {"format": "pt"})
    pipeline: Any = getattr(diffusers, PIPELINES[name]).from_pretrained(place.folder / "model", local_files_only=True)
    pipeline.load_lora_weights(tmp_path, weight_name="x.safetensors")
    pipeline.fuse_lora(components=["unet" if name == "sdxl" else "transformer", "text_encoder", "text_encoder_2"])
    pipeline.unload_lora_weights()
    parts = {
        "denoiser": pipeline.unet if name == "sdxl" else pipeline.transformer,
        "text_encoder_1": pipeline.text_encoder,
        "text_encoder_2": pipeline.text_encoder_2,
    }
    for part, module in parts.items():
        close(dict(module.state_dict()), expected[part], base[part])


CLASSES = {"hunyuan_video": "HunyuanVideoTransformer3DModel", "framepack": "HunyuanVideoFramepackTransformer3DModel"}


@pytest.mark.parametrize("kept", [True, False], ids=["metadata", "no metadata"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", list(CLASSES))
def test_transformers_of_videos_load_it(family_place: Make, tmp_path: Path, name: str, kind: str, kept: bool) -> None:
    place = family_place(name)
    network = SCALES["patterns"] if kept else SCALES["alpha"]
    run, state, base, expected = trained(place, type=kind, **network)
    tensors, metadata = diffusers_state(run.targets, state, torch.float32)
    write_tensors(tmp_path / "x.safetensors", tensors, metadata)
    theirs: Any = getattr(diffusers, CLASSES[name]).from_pretrained(
        place.folder / "model" / "transformer", local_files_only=True
    )
    own = {key.removeprefix("transformer."): x for key, x in load_file(tmp_path / "x.safetensors").items()}
    settings = {
        key.removeprefix("transformer."): value for key, value in json.loads(metadata[ADAPTER_METADATA]).items()
    }
    theirs.load_lora_adapter(own, prefix=None, metadata=settings if kept else None)
    theirs.fuse_lora()
    theirs.unload_lora()
    close(dict(theirs.state_dict()), expected["denoiser"], base["denoiser"])


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "oft"])
@pytest.mark.parametrize("name", FAMILIES)
def test_peft_loads_every_kind_by_its_metadata(family_place: Make, name: str, kind: str) -> None:
    """The configuration that the file names, peft's own loader, peft's own merge."""
    network = {"rank": 4, "targets": "attention"} if kind == "oft" else {"alpha": 1.0, "rank_pattern": {"to_k": 4}}
    run, state, base, expected = trained(family_place(name), type=kind, **network)
    tensors, metadata = diffusers_state(run.targets, state, torch.float32)
    root = run.targets[0].diffusers.partition(".")[0]
    settings = {key.removeprefix(f"{root}."): value for key, value in json.loads(metadata[ADAPTER_METADATA]).items()}
    config = {"LORA": peft.LoraConfig, "LOHA": peft.LoHaConfig, "LOKR": peft.LoKrConfig, "OFT": peft.OFTConfig}[
        settings.pop("peft_type")
    ]
    module: nn.Module = family(name).load(run.model, "denoiser", OPTIONS)
    model: Any = peft.inject_adapter_in_model(config(**settings), module)
    outcome = peft.set_peft_model_state_dict(model, {key.removeprefix(f"{root}."): x for key, x in tensors.items()})
    assert not outcome.unexpected_keys
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged_layers = [
        layer for layer in model.modules() if isinstance(layer, BaseTunerLayer) and hasattr(layer, "merge")
    ]
    assert len(merged_layers) >= len(run.targets)
    for target in run.targets:
        layer: Any = model.get_submodule(target.name)
        layer.merge()
        wanted = expected["denoiser"][f"{target.name}.weight"]
        torch.testing.assert_close(layer.get_base_layer().weight.detach(), wanted, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(base["denoiser"][key], x) for key, x in expected["denoiser"].items())


def test_diffusers_reads_kohyas_file_of_sdxls_text_encoders(family_place: Make, tmp_path: Path) -> None:
    place = family_place("sdxl")
    run, state, base, expected = trained(place, 2, **SCALES["patterns"])
    own = [target for target in run.targets if target.component != "denoiser"]
    texts = {key: x for key, x in state.items() if not key.startswith("denoiser")}
    write_tensors(tmp_path / "x.safetensors", kohya_state(own, texts, torch.float32))
    pipeline: Any = diffusers.StableDiffusionXLPipeline.from_pretrained(place.folder / "model", local_files_only=True)
    pipeline.load_lora_weights(tmp_path, weight_name="x.safetensors")
    pipeline.fuse_lora(components=["text_encoder", "text_encoder_2"])
    pipeline.unload_lora_weights()
    for part, module in (("text_encoder_1", pipeline.text_encoder), ("text_encoder_2", pipeline.text_encoder_2)):
        close(dict(module.state_dict()), expected[part], base[part])
