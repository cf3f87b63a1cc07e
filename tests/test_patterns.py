"""rank_pattern and alpha_pattern inside a fused q, k, v: published, started from, and resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from runner.errors import Invalid, InvalidConfig
from runner.families.contract import LoadOptions
from runner.families.registry import family
from runner.formats.adapter_read import read_adapters, read_lora
from runner.formats.adapter_write import Base, kohya_state
from runner.networks.attach import Dropouts, attach
from runner.networks.merge import merged
from runner.networks.shapes import adapter_shapes, count_parameters
from runner.plan.adapter_files import adapter_numbers
from runner.weights.tensors import write_tensors
from tests.adapters import merged_file
from tests.inprocess import applied, prepared, stopped_anew, trained_bytes
from tests.support import Place
from tests.test_comfyui import assert_comfyui_agrees, assert_original_layout, written

NETWORK = {
    "rank": 2,
    "alpha": 1.0,
    "rank_pattern": {"to_k|add_v_proj|proj_mlp": 4},
    "alpha_pattern": {"to_q|add_q_proj": 6.0},
}


@pytest.mark.parametrize(
    "pattern",
    [NETWORK, {"rank": 2, "alpha": 1.0}, {**NETWORK, "targets": [r"attn\.to_[qv]$", r"add_k_proj$", r"norm_out"]}],
    ids=["patterns", "plain", "some"],
)
@pytest.mark.parametrize("form", ["kohya", "comfyui"])
@pytest.mark.parametrize("kind", ["lora", "dora", "loha"])
@pytest.mark.parametrize("name", ["sd3", "hunyuan_video"])
def test_what_is_written_is_read_again(
    family_place: Callable[..., Place], tmp_path: Path, name: str, kind: str, form: Any, pattern: dict[str, Any]
) -> None:
    """The run's own parameters come back from a fused module, where each has a first factor of its own too."""
    if kind == "dora" and form == "comfyui":
        pytest.skip("is for ComfyUI alone")
    pattern = {key: value for key, value in pattern.items() if "targets" not in pattern or not key.endswith("_pattern")}
    run, file, base, expected = written(family_place(name), name, form, type=kind, **pattern)
    write_tensors(tmp_path / "x.safetensors", file)
    again = read_adapters(tmp_path / "x.safetensors", run.targets)
    assert sum(tensor.numel() for tensor in again.values()) == count_parameters(run.targets)
    for part, tensors in merged(run.targets, again, base).items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected[part][key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["kohya", "comfyui"])
@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "oft"])
@pytest.mark.parametrize("name", ["sd15", "sd3", "hunyuan_video", "framepack", "flux1", "chroma"])
def test_what_is_written_is_merged_first(
    family_place: Callable[..., Place], tmp_path: Path, name: str, kind: str, form: Any
) -> None:
    """network.base_weights and `sample --lora` make the trained weights of every kind of file."""
    if kind == "dora" and form == "comfyui":
        pytest.skip("is for ComfyUI alone")
    run, file, _, expected = written(family_place(name), name, form, type=kind)
    write_tensors(tmp_path / "x.safetensors", file)
    found = merged_file(run, tmp_path / "x.safetensors")
    for part, tensors in expected.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(
                found[part][key], tensor, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )


def patterned(place: Place, **changes: Any) -> Path:
    return place.write(
        {
            "network": {**NETWORK, **changes},
            "training": {"checkpoints": {"dtype": "fp32"}},
            "selection": {"strategy": "last", "publish": [{"format": "comfyui", "directory": "out", "mode": "copy"}]},
        }
    )


@pytest.mark.parametrize("name", ["sd3", "hunyuan_video", "framepack", "flux1", "chroma"])
def test_a_run_with_patterns_is_published_started_from_and_resumed(
    family_place: Callable[..., Place], name: str
) -> None:
    place = family_place(name)
    file = patterned(place)
    outcome = applied(file)
    run = prepared(file)
    folder = run.store.artifact("train", outcome.graph.fingerprint("train")) / "checkpoints"
    state = load_file(sorted(folder.iterdir())[-1] / "raw.safetensors")
    assert sum(tensor.numel() for tensor in state.values()) == count_parameters(run.targets)
    module = family(name).load(run.model, "denoiser", LoadOptions(dtype=torch.float32, device=torch.device("cpu")))
    base = {"denoiser": dict(module.state_dict())}
    expected = merged(run.targets, state, base)
    best = place.output / "best.safetensors"
    assert_original_layout(name, run, load_file(best), base, expected)
    assert_comfyui_agrees(name, run, load_file(next((place.folder / "out").iterdir())), base, expected)
    again = read_adapters(best, run.targets)
    assert set(again) == set(state)
    for key, tensor in state.items():
        torch.testing.assert_close(again[key], tensor)
    started = prepared(patterned(place, init_from=str(best)))
    assert started.init_from == best
    patterned(place)
    whole = trained_bytes(file)
    stopped_anew(place, 3)
    assert trained_bytes(file) == whole


def test_alpha_is_not_rounded(family_place: Callable[..., Place]) -> None:
    """bf16 would make 1.3 1.296875, and each scale with it."""
    run = prepared(family_place("sd15").write({"network": {"rank": 2, "alpha": 1.3}}))
    state = {
        f"{target.full_name}.{key}": torch.zeros(shape)
        for target in run.targets
        for key, shape in adapter_shapes(target).items()
    }
    file = kohya_state(run.targets, state, torch.bfloat16)
    alphas = {float(tensor) for key, tensor in file.items() if key.endswith(".alpha")}
    assert alphas == {float(torch.tensor(1.3))}
    assert {tensor.dtype for key, tensor in file.items() if not key.endswith(".alpha")} == {torch.bfloat16}
    whole = kohya_state([replace(target, alpha=2.0) for target in run.targets], state, torch.bfloat16)
    assert {tensor.dtype for tensor in whole.values()} == {torch.bfloat16}


def test_the_plan_says_what_files_hold(family_place: Callable[..., Place]) -> None:
    place = family_place("hunyuan_video")
    publish = {"publish": [{"format": "comfyui", "directory": "out"}]}
    lokr = prepared(place.write({"network": {"type": "lokr", "rank": 2}, "selection": publish})).notes
    wanted = [
        "best.safetensors: 6 of 20 modules are written as differences of the weights, 0.1 MB, since a Kronecker product of "
        'q, k and v as one layer has no form there; format = "diffusers" holds the adapter as it is'
    ]
    assert [note for note in lokr if note.startswith("best.safetensors")] == wanted
    assert [note for note in lokr if note.startswith('files of format = "comfyui"')]
    oft = prepared(place.write({"network": {"type": "oft"}})).notes
    assert any("20 of 20 modules" in note and "no program reads rotations of the input" in note for note in oft)
    dora = prepared(place.write({"network": {"type": "dora"}, "selection": publish})).notes
    assert any("at strength 1, and are for ComfyUI alone" in note for note in dora)
    for kind in ("lora", "loha"):
        notes = prepared(place.write({"network": {"type": kind}, "selection": publish})).notes
        assert not any("safetensors" in note or "ComfyUI" in note for note in notes)


def test_exports_are_as_large_as_predicted(family_place: Callable[..., Place]) -> None:

    place = family_place("hunyuan_video")
    for kind in ("lokr", "oft", "loha"):
        run = prepared(place.write({"network": {"type": kind, "rank": 2}}))
        module = family("hunyuan_video").load(
            run.model, "denoiser", LoadOptions(dtype=torch.float32, device=torch.device("cpu"))
        )
        base = {"denoiser": {key: tensor.clone() for key, tensor in module.state_dict().items()}}
        state = {key: x.detach() for key, x in attach({"denoiser": module}, run.targets, Dropouts(), -1, 1).items()}
        file = kohya_state(run.targets, state, torch.float32, Base(base, run.spec.layers(run.model)))
        numbers = sum(tensor.numel() for key, tensor in file.items() if not key.endswith(".alpha"))
        predicted = adapter_numbers(run.targets, "kohya", count_parameters(run.targets))
        assert numbers == pytest.approx(predicted, rel=0.0 if kind != "loha" else 0.7)


def test_a_dora_for_comfyui_is_not_started_from(family_place: Callable[..., Place]) -> None:
    place = family_place("sd15")
    changes = {
        "network": {"type": "dora", "rank": 2},
        "training": {"max_train_steps": 1},
        "selection": {"strategy": "last", "publish": [{"format": "comfyui", "directory": "out", "mode": "copy"}]},
    }
    applied(place.write(changes))
    file = next((place.folder / "out").iterdir())
    words = "it is a DoRA written for ComfyUI, whose rule is another one"
    place.write({**changes, "network": {**changes["network"], "init_from": str(file)}})
    with pytest.raises(InvalidConfig, match=words):
        prepared(place.file)
    run = prepared(place.write(changes))
    with pytest.raises(Invalid, match=words):
        read_lora(file, run.spec.layers(run.model), 1.0)
