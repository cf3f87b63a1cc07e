"""What files of many tools call a model's layers, and the tensors of their adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from runner.errors import Invalid, InvalidConfig
from runner.families.identify import identify
from runner.formats.adapter_names import is_adapter_file, parse
from runner.formats.adapter_read import read_adapters, read_lora
from runner.plan.prepare import Prepared
from runner.weights.tensors import write_tensors
from tests.adapters import States, merged_file, modules_of, states
from tests.inprocess import prepared
from tests.support import DATA, Place

Make = Callable[..., Place]
UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
Layers = list[str]
NAMES: list[tuple[str, str, Layers]] = [
    # Kohya's, with diffusers' names too; LyCORIS'; ComfyUI's and diffusion-pipe's; diffusers'; peft's; no prefix
    ("sd15", f"lora_unet_{UNET.replace('.', '_')}_to_q", [f"{UNET}.to_q"]),
    ("sd15", "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", [f"{UNET}.to_q"]),
    ("sd15", "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q", [f"{UNET}.to_q"]),
    ("sd15", f"lycoris_{UNET.replace('.', '_')}_to_out_0", [f"{UNET}.to_out.0"]),
    ("sd15", f"unet.{UNET}.to_out.0", [f"{UNET}.to_out.0"]),
    ("sd15", f"base_model.model.{UNET}.to_v", [f"{UNET}.to_v"]),
    ("sd15", f"unet.base_model.model.{UNET}.to_v", [f"{UNET}.to_v"]),
    ("sd15", f"{UNET}.to_v", [f"{UNET}.to_v"]),
    ("sd15", "lora_te_text_model_encoder_layers_0_mlp_fc1", ["encoder.layers.0.mlp.fc1"]),
    ("sd15", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj", ["encoder.layers.0.self_attn.q_proj"]),
    ("sdxl", "lora_unet_middle_block_1_proj_in", ["mid_block.attentions.0.proj_in"]),
    ("sdxl", "lora_unet_mid_block_attentions_0_proj_in", ["mid_block.attentions.0.proj_in"]),
    ("sdxl", "lora_te1_text_model_encoder_layers_0_self_attn_k_proj", ["encoder.layers.0.self_attn.k_proj"]),
    ("sdxl", "lora_te2_text_model_encoder_layers_0_self_attn_k_proj", ["text_model.encoder.layers.0.self_attn.k_proj"]),
    ("sdxl", "lora_te2_text_projection", ["text_projection"]),
    (
        "sdxl",
        "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc2",
        ["text_model.encoder.layers.0.mlp.fc2"],
    ),
    ("sd3", "lora_transformer_transformer_blocks_0_attn_to_q", ["transformer_blocks.0.attn.to_q"]),
    ("sd3", "transformer.transformer_blocks.0.attn.add_k_proj", ["transformer_blocks.0.attn.add_k_proj"]),
    ("sd3", "base_model.model.transformer_blocks.0.attn.to_k", ["transformer_blocks.0.attn.to_k"]),
    ("sd3", "diffusion_model.joint_blocks.1.x_block.attn.qkv", [f"transformer_blocks.1.attn.to_{x}" for x in "qkv"]),
    ("sd3", "joint_blocks.0.context_block.attn.qkv", [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"]),
    ("sd3", "lora_unet_joint_blocks_0_x_block_mlp_fc1", ["transformer_blocks.0.ff.net.0.proj"]),
    # OMI's, which OneTrainer writes
    (
        "sdxl",
        "unet.middle_block.1.transformer_blocks.0.attn2.to_out.0",
        ["mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"],
    ),
    ("sdxl", "clip_g.text_projection", ["text_projection"]),
    ("sd15", "clip_l.text_model.encoder.layers.0.mlp.fc2", ["encoder.layers.0.mlp.fc2"]),
    ("sd3", "clip_l.text_model.encoder.layers.0.self_attn.q_proj", ["text_model.encoder.layers.0.self_attn.q_proj"]),
    ("sd3", "t5.encoder.block.0.layer.0.SelfAttention.q", ["encoder.block.0.layer.0.SelfAttention.q"]),
    ("sd3", "transformer.joint_blocks.0.x_block.attn.qkv.1", ["transformer_blocks.0.attn.to_k"]),
    ("hunyuan_video", "transformer.double_blocks.0.txt_attn.qkv.2", ["transformer_blocks.0.attn.add_v_proj"]),
    ("hunyuan_video", "transformer.single_blocks.0.linear1.3", ["single_transformer_blocks.0.proj_mlp"]),
    (
        "framepack",
        "transformer.txt_in.individual_token_refiner.blocks.0.self_attn.qkv.0",
        ["context_embedder.token_refiner.refiner_blocks.0.attn.to_q"],
    ),
    ("framepack", "transformer.single_blocks.0.linear1.0", ["single_transformer_blocks.0.attn.to_q"]),
    ("sd3", "lora_te3_encoder_block_0_layer_0_SelfAttention_q", ["encoder.block.0.layer.0.SelfAttention.q"]),
    *(
        entry
        for name in ("hunyuan_video", "framepack")
        for entry in (
            (
                name,
                "diffusion_model.double_blocks.0.img_attn.qkv",
                [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
            ),
            (
                name,
                "transformer.double_blocks.0.txt_attn_qkv",
                [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"],
            ),
            (name, "diffusion_model.double_blocks.0.img_mlp.0", ["transformer_blocks.0.ff.net.0.proj"]),
            (name, "double_blocks.0.txt_mlp.2", ["transformer_blocks.0.ff_context.net.2"]),
            (name, "diffusion_model.double_blocks.0.img_mod.lin", ["transformer_blocks.0.norm1.linear"]),
            (name, "Hunyuan_video_I2V_lora_double_blocks_0_img_mlp_fc2", ["transformer_blocks.0.ff.net.2"]),
            (
                name,
                "Hunyuan_video_I2V_lora_single_blocks_0_linear1",
                [*(f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"), "single_transformer_blocks.0.proj_mlp"],
            ),
            (name, "lora_transformer_single_transformer_blocks_0_proj_out", ["single_transformer_blocks.0.proj_out"]),
            (name, "lora_unet_transformer_blocks_0_attn_to_out_0", ["transformer_blocks.0.attn.to_out.0"]),
        )
    ),
]
FORMS = [
    ("{}.lora_down.weight", "{}.lora_up.weight"),
    ("{}.lora_A.weight", "{}.lora_B.weight"),
    ("{}.lora_A", "{}.lora_B"),
    ("{}.lora_A.default.weight", "{}.lora_B.default.weight"),
    ("{}.lora.down.weight", "{}.lora.up.weight"),
    ("{}.lora_linear_layer.down.weight", "{}.lora_linear_layer.up.weight"),
    ("{}_lora.down.weight", "{}_lora.up.weight"),
]


def weights(found: States, names: Layers) -> Tensor:
    """The rows of some layers of a model, one after the other."""
    return torch.cat(
        [next(own[f"{name}.weight"] for own in found.values() if f"{name}.weight" in own) for name in names]
    )


def changed_keys(after: States, before: States) -> set[str]:
    return {key for part, own in after.items() for key, x in own.items() if not torch.equal(x, before[part][key])}


@pytest.mark.parametrize(("name", "module", "layers"), NAMES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_layer_is_found_by_every_name(
    runs: Callable[[str], Prepared], tmp_path: Path, name: str, module: str, layers: Layers
) -> None:
    """W + up @ down · alpha / rank on the rows of these layers, and nothing else."""
    run = runs(name)
    before = states(modules_of(run))
    base = weights(before, layers)
    down, up = torch.randn(2, base[0].numel()), torch.randn(len(base), 2)
    write_tensors(
        tmp_path / "x.safetensors",
        {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up, f"{module}.alpha": torch.tensor(1.0)},
    )
    after = merged_file(run, tmp_path / "x.safetensors", 0.5)
    torch.testing.assert_close(weights(after, layers), base + (0.25 * up @ down).reshape(base.shape))
    assert changed_keys(after, before) == {f"{layer}.weight" for layer in layers}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form[0])
def test_the_tensors_are_found_by_every_name(
    runs: Callable[[str], Prepared], tmp_path: Path, form: tuple[str, str]
) -> None:
    run = runs("sd15")
    module = f"unet.{UNET}.processor.to_out" if form[0] == "{}_lora.down.weight" else f"unet.{UNET}.to_out.0"
    base = weights(states(modules_of(run)), [f"{UNET}.to_out.0"])
    down, up = torch.randn(2, base.shape[1]), torch.randn(len(base), 2)
    write_tensors(tmp_path / "x.safetensors", {form[0].format(module): down, form[1].format(module): up})
    after = merged_file(run, tmp_path / "x.safetensors")
    torch.testing.assert_close(weights(after, [f"{UNET}.to_out.0"]), base + up @ down)


def test_attention_of_text_encoders_before_peft(runs: Callable[[str], Prepared], tmp_path: Path) -> None:
    run, layer = runs("sd15"), "encoder.layers.0.self_attn.out_proj"
    base = weights(states(modules_of(run)), [layer])
    down, up = torch.randn(2, base.shape[1]), torch.randn(len(base), 2)
    module = "text_encoder.text_model.encoder.layers.0.self_attn.to_out"
    write_tensors(tmp_path / "x.safetensors", {f"{module}_lora.down.weight": down, f"{module}_lora.up.weight": up})
    torch.testing.assert_close(weights(merged_file(run, tmp_path / "x.safetensors"), [layer]), base + up @ down)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "hunyuan_video", "framepack", "flux1", "chroma"])
def test_no_name_is_of_two_modules(runs: Callable[[str], Prepared], name: str) -> None:
    """Layers of one name are the parts of one module: their blocks of rows are all of them, each once."""
    run = runs(name)
    found: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
    for layer in run.spec.layers(run.model):
        for alias in layer.aliases:
            found.setdefault((layer.component, alias.module), []).append((*alias.part, alias.span))
    for module, parts in found.items():
        assert len({whole for _, whole, _ in parts}) == 1, module
        blocks = sorted(first + index for first, _, span in parts for index in range(span))
        assert blocks == list(range(parts[0][1])), module


def test_one_layer_by_two_names_is_refused(runs: Callable[[str], Prepared], tmp_path: Path) -> None:
    run = runs("sd15")
    one, other = f"unet.{UNET}.to_q", f"lora_unet_{UNET.replace('.', '_')}_to_q"
    size = weights(states(modules_of(run)), [f"{UNET}.to_q"]).shape[1]
    tensors = {
        f"{module}.{half}": torch.zeros(2, size).reshape(shape)
        for module in (one, other)
        for half, shape in (("lora_A.weight", (2, size)), ("lora_B.weight", (size, 2)))
    }
    write_tensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(Invalid, match=r"and .* are for the same layer"):
        read_lora(tmp_path / "x.safetensors", run.spec.layers(run.model), 1.0)
    write_tensors(
        tmp_path / "x.safetensors",
        {
            f"{one}.lora_A.weight": torch.zeros(2, size),
            f"{one}.lora_A.style.weight": torch.zeros(2, size),
            f"{one}.lora_B.weight": torch.zeros(size, 2),
        },
    )
    with pytest.raises(Invalid, match=r"lora_A\.style\.weight and .*lora_A\.weight are for the same layer"):
        read_lora(tmp_path / "x.safetensors", run.spec.layers(run.model), 1.0)


def test_what_a_file_has_beside_layers_is_named(runs: Callable[[str], Prepared], tmp_path: Path) -> None:
    """Refused, and with skip_unknown left out, counted and named."""
    run = runs("sd15")
    size = weights(states(modules_of(run)), [f"{UNET}.to_q"]).shape[1]
    file = tmp_path / "x.safetensors"
    good = {
        f"unet.{UNET}.to_q.lora_A.weight": torch.ones(2, size),
        f"unet.{UNET}.to_q.lora_B.weight": torch.ones(size, 2),
    }
    strange = {
        "bundle_emb.cat.string_to_param.*": torch.zeros(1, 4),
        "lora_unet_other.lora_down.weight": torch.zeros(1, 4),
        "lora_unet_x.on_input": torch.zeros(1, 4),
    }
    write_tensors(file, {**good, **strange})
    with pytest.raises(Invalid) as caught:
        read_lora(file, run.spec.layers(run.model), 1.0)
    assert caught.value.diagnostics[0].render() == (
        f"error: {file} does not fit: 1 of its layers are not this model's (lora_unet_other); "
        "1 of its tensors are not known here (lora_unet_x.on_input); "
        "1 of its tensors are textual inversions, which no layer has (bundle_emb.cat.string_to_param.*)\n"
        "hint: --skip-unknown leaves out what the model has no place for"
    )
    lora = read_lora(file, run.spec.layers(run.model), 1.0, skip_unknown=True)
    assert lora.left_out == ["lora_unet_other", "bundle_emb.cat.string_to_param.*", "lora_unet_x.on_input"]
    plain = tmp_path / "plain.safetensors"
    write_tensors(plain, good)
    with_all, without = merged_file(run, file, skip_unknown=True), merged_file(run, plain)
    assert not changed_keys(with_all, without)
    write_tensors(file, {**good, **strange, f"unet.{UNET}.to_k.lora_A.weight": torch.ones(2, size)})
    with pytest.raises(Invalid, match=r"to_k has no lora_B$"):
        read_lora(file, run.spec.layers(run.model), 1.0, skip_unknown=True)


def test_the_projection_of_sdxls_second_text_encoder_can_be_trained(family_place: Make, tmp_path: Path) -> None:
    """Not by default, as in Kohya's tools; where a pattern names it, as in OneTrainer."""
    place = family_place("sdxl", training={"components": {"text_encoder_2": True}})
    names = {target.full_name for target in prepared(place.file).targets}
    assert "text_encoder_2.text_projection" not in names
    place.write(
        {
            "network": {"rank": 2, "targets": ["attn1", "text_projection"]},
            "training": {"components": {"text_encoder_2": True}},
        }
    )
    run = prepared(place.file)
    target = next(target for target in run.targets if target.name == "text_projection")
    assert (target.kohya, target.diffusers) == ("lora_te2_text_projection", "text_encoder_2.text_projection")
    place.write({"network": {"rank": 2, "targets": ["attn1", "text_projection"]}})
    with pytest.raises(InvalidConfig, match="no text encoder that trains has a text_projection"):
        prepared(place.file)


def test_training_starts_from_files_with_other_tools_names(runs: Callable[[str], Prepared], tmp_path: Path) -> None:
    """init_from: every layer of the run by its names in ComfyUI, with dots."""
    run = runs("sdxl")
    state: dict[str, Tensor] = {}
    written: dict[str, Tensor] = {}
    for target in run.targets:
        name = f"unet.{target.name.replace('.to_', '.processor.to_').replace('.to_out.0', '.to_out')}"
        for half, (rows, columns), key in (
            ("lora_A", (target.rank, target.inputs), "down"),
            ("lora_B", (target.outputs, target.rank), "up"),
        ):
            state[f"{target.full_name}.{half}"] = torch.randn(rows, columns)
            written[f"{name}{'_lora' if '.to_' in name else '.lora'}.{key}.weight"] = state[
                f"{target.full_name}.{half}"
            ]
    write_tensors(tmp_path / "x.safetensors", written)
    again = read_adapters(tmp_path / "x.safetensors", run.targets)
    assert set(again) == set(state)
    scale = {f"{target.full_name}.lora_B": 1 / target.scale for target in run.targets}
    for key, tensor in state.items():
        torch.testing.assert_close(again[key], tensor * scale.get(key, 1.0))


def test_keys_of_any_kind_are_parsed(runs: Callable[[str], Prepared]) -> None:
    run = runs("sd15")
    parsed = parse(
        [".lora_A.weight", ".alpha", "", "lora_A.weight", "x" * 100_000, "bundle_emb."], run.spec.layers(run.model)
    )
    assert not parsed.modules
    assert len(parsed.keys) + len(parsed.strange) == 6


@pytest.mark.parametrize(
    "form",
    [*FORMS, ("{}.diff", "{}.diff_b"), ("{}.lokr_w1_a", "{}.lokr_w2"), ("{}.a1.weight", "{}.b1.weight")],
    ids=lambda form: form[0],
)
def test_a_file_of_adapters_is_no_checkpoint(form: tuple[str, str]) -> None:
    """Whatever a tool calls its tensors, the message says that a LoRA file was given as the model."""
    keys = [f"{root}{UNET.replace('attn1', 'attn2')}.to_k" for root in ("unet.", "diffusion_model.")]
    kind = identify({name.format(key): ("F16", (4, 4)) for key in keys for name in form})
    assert kind is not None
    assert (kind.words, kind.family) == ("a LoRA file, not a checkpoint", None)


@pytest.mark.parametrize("file", [*DATA.glob("*_keys.json")], ids=lambda file: file.stem)
def test_a_checkpoint_is_no_file_of_adapters(file: Path) -> None:
    content = json.loads(file.read_text())
    keys = content.get("keys", content)
    assert len(keys) > 100
    assert is_adapter_file(keys) == file.stem.startswith("lora_")
