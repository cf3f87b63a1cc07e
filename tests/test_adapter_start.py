"""Files as a start of training, and `runner sample --lora`: what is taken, and why the rest is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from runner.errors import Invalid, InvalidConfig
from runner.formats.adapter_read import read_adapters
from runner.formats.adapter_write import kohya_state
from runner.plan.prepare import Prepared
from runner.weights.tensors import write_tensors
from tests.inprocess import prepared
from tests.support import Place
from tests.test_networks import adapted

Make = Callable[..., Place]


def kohyas(run: Prepared, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return kohya_state(run.targets, {key: x.detach() for key, x in state.items()}, torch.float32)


def refused(file: Path, run: Prepared, tensors: dict[str, Tensor]) -> str:
    write_tensors(file, tensors)
    with pytest.raises(Invalid) as caught:
        read_adapters(file, run.targets)
    return str(caught.value).removeprefix(f"{file} does not fit: ")


def test_forms_that_the_run_does_not_train_are_named(family_place: Make, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    run, _, state = adapted(family_place("sd15"), "sd15")
    good, first = kohyas(run, state), run.targets[0].kohya
    width, outputs = run.targets[0].inputs, run.targets[0].outputs
    without = {key: x for key, x in good.items() if not key.startswith(f"{first}.")}
    cases = {
        f"{first} has diff_b, and adapters of type lora have none here": {
            **good,
            f"{first}.diff_b": torch.zeros(outputs),
        },
        f"{first} is of kind dora, [network] says lora": {**good, f"{first}.dora_scale": torch.ones(1, width)},
        f"{first} is of kind diff, [network] says lora": {**without, f"{first}.diff": torch.zeros(outputs, width)},
        f"{first} is of kind oft_blocks, [network] says lora": {
            **without,
            f"{first}.oft_blocks": torch.zeros(2, outputs // 2, outputs // 2),
        },
        f"{first}.lora_down.weight is of type I64, not one of floating point": {
            **good,
            f"{first}.lora_down.weight": torch.zeros(2, width, dtype=torch.int64),
        },
    }
    for message, tensors in cases.items():
        assert refused(file, run, tensors) == message


def test_a_magnitude_by_input_starts_no_dora(family_place: Make, tmp_path: Path) -> None:
    run, _, state = adapted(family_place("sd15"), "sd15", type="dora")
    good, first = kohyas(run, state), run.targets[0]
    key = f"{first.kohya}.dora_scale"
    message = refused(tmp_path / "x.safetensors", run, {**good, key: torch.ones(1, first.inputs)})
    assert message == f"{key} has a magnitude for each input, adapters here have one for each row"


def test_a_third_factor_is_multiplied_out(family_place: Make, tmp_path: Path) -> None:
    """A LoCon with lora_mid starts plain adapters of convolutions, which can be the same."""
    run, _, state = adapted(family_place("sd15"), "sd15", conv_rank=2)
    good = kohyas(run, state)
    target = next(target for target in run.targets if target.kernel == 3)
    down, mid = torch.randn(2, target.inputs, 1, 1), torch.randn(2, 2, 3, 3)
    write_tensors(
        tmp_path / "x.safetensors",
        {**good, f"{target.kohya}.lora_down.weight": down, f"{target.kohya}.lora_mid.weight": mid},
    )
    found = read_adapters(tmp_path / "x.safetensors", run.targets)[f"{target.full_name}.lora_A"]
    torch.testing.assert_close(found, torch.einsum("mnxy,ni->mixy", mid, down[:, :, 0, 0]))


def test_rows_of_layers_without_adapters_are_not_dropped(family_place: Make, tmp_path: Path) -> None:
    """A file for q, k and v of SD3 does not start a run of q alone; one that is for q alone does."""
    place = family_place("sd3")
    run, _, state = adapted(place, "sd3", targets=[r"attn\.to_q$"])
    good = kohyas(run, state)
    write_tensors(tmp_path / "x.safetensors", good)
    assert set(read_adapters(tmp_path / "x.safetensors", run.targets)) == set(state)
    key = next(key for key in good if key.endswith("qkv.lora_up.weight"))
    module = key.removesuffix(".lora_up.weight")
    message = refused(tmp_path / "x.safetensors", run, {**good, key: torch.ones_like(good[key])})
    assert message.startswith(f"{module} is for more layers than transformer_blocks.0.attn.to_q, which alone")


def test_a_plan_finds_first_factors_that_are_not_shared(family_place: Make) -> None:
    """q, k and v of SD3 share one here: a file of peft's with one each cannot start them."""
    place = family_place("sd3")
    place.write({"network": {"rank": 2}})
    run = prepared(place.file)
    tensors = {
        f"{target.diffusers}.lora_{half}.weight": torch.randn(shape)
        for target in run.targets
        for half, shape in (("A", (2, target.inputs)), ("B", (target.outputs, 2)))
    }
    for target in run.targets:
        if target.kernel > 1:
            tensors[f"{target.diffusers}.lora_A.weight"] = torch.randn(2, target.inputs, target.kernel, target.kernel)
    write_tensors(place.folder / "x.safetensors", tensors)
    place.write({"network": {"rank": 2, "init_from": "x.safetensors"}})
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.file)
    assert (
        "has a first factor of its own, which q, k and v of lora_unet_joint_blocks_0_"
        in caught.value.diagnostics[0].message
    )
    for target in run.targets:
        if target.tied:
            tensors[f"{target.diffusers}.lora_A.weight"] = torch.ones(2, target.inputs)
    write_tensors(place.folder / "x.safetensors", tensors)
    prepared(place.file)


def test_sampling_says_what_it_leaves_out(family_place: Make, tmp_path: Path) -> None:
    from runner.execute.sampling import LoraFile, Sampling

    place = family_place("sd15")
    run = prepared(place.file)
    file, module = tmp_path / "x.safetensors", "lora_unet_input_blocks_1_0_in_layers_2"
    weight = load_file(place.folder / "model" / "unet" / "diffusion_pytorch_model.safetensors")[
        "down_blocks.0.resnets.0.conv1.weight"
    ]
    write_tensors(file, {f"{module}.diff": torch.ones_like(weight), "bundle_emb.cat.clip_l": torch.zeros(1, 4)})
    with pytest.raises(Invalid, match="1 of its tensors are textual inversions"):
        Sampling(run, "base", False, [LoraFile(file=file, multiplier=0.5, include=(), exclude=())])
    sampling = Sampling(
        run, "base", False, [LoraFile(file=file, multiplier=0.5, include=(), exclude=(), skip_unknown=True)]
    )
    assert sampling.notes == ["x.safetensors: 1 of its layers or tensors are left out (bundle_emb.cat.clip_l)"]
    sampling.save_merged(tmp_path / "merged.safetensors")
    found = load_file(tmp_path / "merged.safetensors")["model.diffusion_model.input_blocks.1.0.in_layers.2.weight"]
    torch.testing.assert_close(found.float(), weight + 0.5, rtol=1e-2, atol=1e-2)
