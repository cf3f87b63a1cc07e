"""More model on less machine: each way of it trains the same model, and the plan predicts what it saves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn

from runner.core.offload import saved_on_host
from runner.core.swap import BlockSwap
from runner.errors import InvalidConfig
from runner.families.registry import family
from runner.inputs.train import TrainInputs
from runner.networks.quantize import KINDS, QuantizedLinear, quantize
from runner.plan.estimate import figures
from runner.plan.prepare import Prepared
from runner.stages.modules import build_swapped
from tests.inprocess import applied, planned, prepared, trained_bytes
from tests.support import Place

CPU = torch.device("cpu")
FAMILIES = ["sd15", "sdxl", "sd3", "hunyuan_video", "framepack", "flux1", "chroma"]


def losses(place: Place, **changes: Any) -> list[float]:
    shutil.rmtree(place.folder / ".runner" / "artifacts", ignore_errors=True)
    shutil.rmtree(place.output, ignore_errors=True)
    place.write(changes)
    applied(place.file, until="train")
    run = prepared(place.file)
    lines = (run.output_dir / "logs" / "events.jsonl").read_text().splitlines()
    return [event["loss"] for event in map(json.loads, lines) if event["type"] == "step"]


# --- quantization -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "error"), [("fp8", 0.04), ("fp8_scaled", 0.04), ("int8", 0.01), ("nf4", 0.12)])
def test_a_packed_layer_computes_nearly_the_same(kind: str, error: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(128, 96).requires_grad_(False)
    packed = QuantizedLinear(layer, kind, CPU)
    x = torch.randn(4, 7, 128, requires_grad=True)
    answer = packed(x)
    expected = layer(x.detach())
    assert float((answer.detach() - expected).norm() / expected.norm()) < error
    answer.sum().backward()
    wide = torch.ones(4, 7, 96) @ packed.weight
    torch.testing.assert_close(x.grad, wide), "the gradient is that of the widened weight"
    held = sum(buffer.numel() * buffer.element_size() for buffer in packed.buffers())
    assert held < 0.35 * layer.weight.numel() * 4
    assert not list(packed.state_dict()) or list(packed.state_dict()) == ["bias"]


def test_a_layer_of_any_width_is_packed() -> None:
    for kind in KINDS[1:]:
        layer = nn.Linear(24, 10, bias=False)
        packed = QuantizedLinear(layer, kind, CPU)
        assert packed(torch.randn(2, 24)).shape == (2, 10)
        assert packed(torch.randn(2, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_only_layers_inside_are_packed() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Conv2d(1, 1, 1)))
    quantize(model, "int8", lambda name: name.startswith("1."), CPU)
    assert type(model[0]) is nn.Linear
    assert type(model[1][0]) is QuantizedLinear  # type: ignore[index]


@pytest.mark.parametrize(("name", "kind"), [("sd15", "fp8"), ("sd15", "int8"), ("sdxl", "nf4"), ("sd3", "fp8_scaled")])
def test_an_adapter_trains_on_a_packed_model(family_place: Callable[..., Place], name: str, kind: str) -> None:
    place = family_place(name)
    wide = losses(place)
    packed = losses(place, model={"quantization": kind, "text_encoder_quantization": kind})
    assert packed != wide
    assert packed == pytest.approx(wide, rel=0.1)
    outcome = applied(place.file)
    assert outcome.selection is not None
    assert (prepared(place.file).output_dir / "best.safetensors").exists()


def test_adapters_are_merged_into_a_packed_model(place: Place) -> None:
    """base_weights before training, and `runner sample --lora` after it."""
    applied(place.write({"training": {"learning_rate": 0.05}}))
    shutil.copyfile(place.output / "best.safetensors", place.folder / "first.safetensors")
    packed = {"model": {"quantization": "int8"}, "run": {"name": "second"}}
    plain = losses(place, **packed)
    with_base = losses(place, **packed, network={"base_weights": ["first.safetensors"]})
    assert with_base != plain
    place.write(packed)
    applied(place.file)
    place.run("sample", "--lora", "first.safetensors:0.5", "--out", "out").ok()
    assert len(list((place.folder / "out").glob("*.png"))) == 1


def test_a_packed_run_exports_the_wide_model(place: Place) -> None:
    """The single file has the checkpoint's own weights with the adapter, not the packed ones."""
    from safetensors.torch import load_file

    publish = [{"format": "single_file", "directory": "out", "mode": "copy"}]
    exact = {"checkpoints": {"every_n_steps": 6, "dtype": "fp32"}}
    place.write(
        {"model": {"quantization": "int8"}, "training": exact, "selection": {"strategy": "last", "publish": publish}}
    )
    applied(place.file)
    ours = load_file(next((place.folder / "out").glob("*.safetensors")))
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.norm1.weight"
    assert key in ours
    untouched = "model.diffusion_model.input_blocks.1.0.emb_layers.1.weight"
    original = load_file(place.folder / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(ours[untouched], original["down_blocks.0.resnets.0.time_emb_proj.weight"])


# --- swapping, moving, stepping early -----------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_swapped_blocks_train_the_same(family_place: Callable[..., Place], name: str, checkpointing: bool) -> None:
    place = family_place(name)
    memory = {"gradient_checkpointing": checkpointing}
    reference = losses(place, training={"memory": memory})
    run = prepared(place.file)
    for swapped in {1, run.spec.swap_rule(run.model, True).most}:
        found = losses(place, training={"memory": {**memory, "blocks_to_swap": swapped}})
        assert found == pytest.approx(reference, rel=1e-6)


def test_swapped_blocks_are_not_on_the_device(family_place: Callable[..., Place]) -> None:
    """At most as many as there is room for, and a training step brings no more than it must."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5))).requires_grad_(False)
    x = torch.randn(3, 6, requires_grad=True)
    expected = blocks(x)
    expected.sum().backward()
    wanted, x.grad = x.grad, None
    swap = BlockSwap(list(blocks), 3, CPU)
    assert all(block.weight.numel() == 0 for block in blocks)
    answer = blocks(x)
    assert torch.equal(answer, expected)
    assert [block.weight.numel() > 0 for block in blocks] == [False, False, False, True, True]
    answer.sum().backward()
    torch.testing.assert_close(x.grad, wanted)
    assert swap.loads == 5 + 3, "the backward pass begins with what the forward pass left there"
    assert [block.weight.numel() > 0 for block in blocks] == [True, True, False, False, False]


def test_weights_do_not_move_with_the_activations() -> None:
    """What the graph keeps: the weight itself, and of each activation a copy."""
    layer = nn.Linear(4, 4)
    x = torch.randn(2, 4, requires_grad=True)
    weights = frozenset({layer.weight.untyped_storage().data_ptr()})
    y = layer(x)
    with saved_on_host(CPU, weights):
        kept = layer(y)
    saved = [getattr(kept.grad_fn, name) for name in ("_saved_mat1", "_saved_mat2")]
    assert saved[1].data_ptr() == layer.weight.data_ptr()
    assert saved[0].data_ptr() != y.data_ptr()
    assert torch.equal(saved[0], y)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_in_the_backward_pass_is_the_same_step(family_place: Callable[..., Place], name: str) -> None:
    """Also with the optimizer's states on the host: equal weights to the last bits of a sum."""
    place = family_place(name)
    whole: dict[str, Any] = {"network": None, "selection": {"publish": []}}
    base = {"max_grad_norm": 0.5, "clip_grad": "per_tensor", "max_train_steps": 3}
    reference = load(trained_bytes(place.write({**whole, "training": base})))
    for number, memory in enumerate(
        ({"fused_backward": True}, {"optimizer_offload": True}, {"fused_backward": True, "optimizer_offload": True})
    ):
        changes = {**whole, "training": {**base, "memory": memory}, "run": {"name": f"f{number}"}}
        found = losses_and_weights(place, changes)
        for key, tensor in reference.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6)


def losses_and_weights(place: Place, changes: dict[str, Any]) -> dict[str, Tensor]:
    shutil.rmtree(place.folder / ".runner" / "artifacts", ignore_errors=True)
    return load(trained_bytes(place.write(changes)))


def test_bf16_weights_with_stochastic_rounding_learn(family_place: Callable[..., Place]) -> None:
    """Updates far below bf16's digits: plain rounding would leave the weights as they are."""
    place = family_place("sd3")
    rounding = {"optimizer": {"stochastic_rounding": True}, "learning_rate": 1e-4, "max_train_steps": 4}
    found = load(trained_bytes(place.write({"network": None, "selection": {"publish": []}, "training": rounding})))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    run = prepared(place.file)
    from runner.families.contract import LoadOptions

    start = family("sd3").load(run.model, "denoiser", LoadOptions(dtype=torch.bfloat16, device=CPU)).state_dict()
    changed = sum(
        int((found[f"denoiser.{key}"] != tensor).sum()) for key, tensor in start.items() if f"denoiser.{key}" in found
    )
    assert changed > 100


@pytest.mark.slow
def test_tiles_encode_nearly_the_same(place: Place) -> None:
    """A picture larger than a tile: other latents, near those of the whole; its key is another."""
    from tests.support import draw_pictures

    draw_pictures(place.folder / "big", 3, size=128)
    base = {"dataset": {"resolution": 128, "sources": [{"path": "big"}], "held_out": None}}
    whole = losses(place, **base)
    tiled = losses(place, **base, caching={"vae_tile_size": 64})
    assert tiled != whole
    assert tiled == pytest.approx(whole, rel=0.2)


# --- predictions ------------------------------------------------------------------------------------------------------


def peak(place: Place, *settings: str) -> int:
    return figures(planned(place.file, 'run.device="cuda"', *settings), None).memory.phases["train"]


def test_the_plan_predicts_what_each_way_saves(family_place: Callable[..., Place]) -> None:
    for name in FAMILIES:
        place = family_place(name, dataset={"batch_size": 8})
        base = peak(place)
        assert peak(place, 'model.quantization="nf4"') < peak(place, 'model.quantization="fp8"') < base
        if name in ("sd15", "sdxl"):  # two blocks are on their way at a time: the others have too few
            assert peak(place, "training.memory.blocks_to_swap=3") < base
        checkpointed = peak(place, "training.memory.gradient_checkpointing=true")
        assert checkpointed < base
        assert (
            peak(place, "training.memory.gradient_checkpointing=true", "training.memory.activation_offload=true")
            < checkpointed
        )
        place.write({"network": None, "training": {"max_grad_norm": 0.0}})
        whole = peak(place)
        assert peak(place, "training.memory.fused_backward=true") <= whole
        assert peak(place, "training.memory.optimizer_offload=true") < whole
        assert peak(place, "training.optimizer.stochastic_rounding=true") < whole


def test_gradients_are_counted_with_checkpointing_too(family_place: Callable[..., Place]) -> None:
    """Weights, gradients and Adam's states of a full fine-tune: 16 bytes a parameter at the least."""
    for name in FAMILIES:
        place = family_place(name, network=None, selection={"publish": []})
        count = prepared(place.file).model.components["denoiser"].parameters
        bare = figures(planned(place.file, 'run.device="cuda"'), None).memory.phases["train"]
        for checkpointing in ("false", "true"):
            found = peak(place, f"training.memory.gradient_checkpointing={checkpointing}")
            assert found - 50_000_000 > 16 * count, (name, checkpointing, bare)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": None, "model": {"quantization": "fp8"}}, 'quantization = "fp8" holds frozen weights'),
        ({"network": None, "training": {"memory": {"fused_backward": True}}}, "fused_backward frees each gradient"),
        (
            {"training": {"memory": {"fused_backward": True}, "max_grad_norm": 0.0}},
            "fused_backward is for full fine-tunes",
        ),
        ({"network": None, "training": {"memory": {"blocks_to_swap": 1}}}, "blocks_to_swap gives up"),
        ({"training": {"memory": {"blocks_to_swap": 99}}}, "blocks; one must stay"),
        ({"training": {"memory": {"blocks_to_swap": 1}, "compile": True}}, "cannot be compiled"),
        (
            {"training": {"optimizer": {"stochastic_rounding": True}}},
            "stochastic_rounding is for weights that train whole",
        ),
        ({"training": {"optimizer": {"type": "adamv"}}}, 'there is no optimizer "adamv"'),
        ({"training": {"optimizer": {"type": "nowhere.Adam"}}}, 'the package "nowhere"'),
        ({"training": {"optimizer": {"type": "lion", "eps": 1e-8}}}, 'the optimizer "lion" has no `eps`'),
    ],
)
def test_what_does_not_go_together_is_refused(place: Place, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.write({**changes, "selection": {"publish": []}}))
    assert any(message in finding.message for finding in caught.value.diagnostics), caught.value


def test_a_class_of_optimizers_by_its_full_name(place: Place) -> None:
    """Its arguments are checked against its signature before anything is loaded."""
    from runner.errors import Invalid

    plain = losses(place)
    assert (
        losses(place, training={"optimizer": {"type": "torch.optim.NAdam", "args": {"momentum_decay": 0.01}}}) != plain
    )
    for name, args, message in (
        ("torch.optim.NAdam", {"momentum": 0.1}, "has no argument `momentum`"),
        ("torch.nn.Linear", {}, "is no class of optimizers"),
        ("torch.optim.Nothing", {}, "is no class of optimizers"),
    ):
        place.write({"training": {"optimizer": {"type": name, "args": args}}})
        shutil.rmtree(place.folder / ".runner")
        with pytest.raises(Invalid, match=message):
            applied(place.file, until="train")
        assert not list((place.folder / ".runner").rglob("items/latents/*")), "nothing was encoded"


def test_builds_are_swapped_for_samples_too(family_place: Callable[..., Place]) -> None:
    place = family_place("sd15")
    place.write({"training": {"memory": {"blocks_to_swap": 2}}})
    outcome = applied(place.file)
    assert outcome.selection["chosen"] is not None
    run: Prepared = prepared(place.file)
    from runner.core.events import Events
    from runner.execute.apply import Apply
    from runner.stages.stop import StopFlag

    apply = Apply(run, Events(None), StopFlag(), None, "")
    assert build_swapped(apply.context, apply.graph.of(TrainInputs)).swap is not None


@pytest.mark.parametrize("name", ["hunyuan_video", "framepack"])
def test_what_blocks_to_swap_means_for_video(family_place: Callable[..., Place], name: str) -> None:
    """musubi-tuner's numbers: 36 of 20 + 40 blocks while training, 38 else; the plan predicts the full-size model."""
    from dataclasses import replace

    from runner.families.parts.files import CONFIGS

    run = prepared(family_place(name).file)
    config = json.loads((CONFIGS / name / "transformer" / "config.json").read_text())
    denoiser = replace(run.model.components["denoiser"], config=config)
    model = replace(run.model, components={**run.model.components, "denoiser": denoiser})
    training, sampling = (run.spec.swap_rule(model, trains) for trains in (True, False))
    assert (training.most, sampling.most) == (36, 38)
    assert [training.blocks(number) for number in (0, 1, 20, 36)] == [0, 3, 10 + 21, 18 + 37]
    assert sampling.blocks(38) == 19 + 39


def test_modulations_stay_wide(family_place: Callable[..., Place]) -> None:
    """fp8_scaled packs 440 layers of the full model: none of the modulations."""
    from runner.families.contract import LoadOptions

    run = prepared(family_place("framepack").file)
    module = family("framepack").load(
        run.model, "denoiser", LoadOptions(dtype=torch.float32, device=CPU, quantization="fp8_scaled")
    )
    packed = {key for key, layer in module.named_modules() if isinstance(layer, QuantizedLinear)}
    assert packed == {target.name for target in run.targets}
