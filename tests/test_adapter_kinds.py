"""Every kind of adapter that files have, merged: the formulas, in fused modules too; and shapes checked before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from runner.errors import Invalid, InvalidConfig
from runner.formats.adapter_fit import check_mergeable
from runner.formats.adapter_names import parse
from runner.formats.adapter_read import read_lora
from runner.formats.adapter_start import check_adapter_file
from runner.model.targets import Target
from runner.networks.merge import merge_into
from runner.plan.prepare import Prepared
from runner.weights.headers import Header, read_header
from runner.weights.tensors import write_tensors
from tests.adapters import States, merged_file, modules_of, states
from tests.inprocess import prepared
from tests.support import Place

Make = Callable[..., Place]
Tensors = dict[str, Tensor]
RANK = 2
MODULES = {
    # Kohya's name → the layers of its rows
    "lora_unet_joint_blocks_0_x_block_attn_qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
    "lora_unet_joint_blocks_0_context_block_mlp_fc1": ["transformer_blocks.0.ff_context.net.0.proj"],
    "lora_unet_x_embedder_proj": ["pos_embed.proj"],
}
SWAPPED = {"lora_unet_final_layer_adaLN_modulation_1": ["norm_out.linear"]}
UNET = {"lora_unet_input_blocks_1_0_in_layers_2": ["down_blocks.0.resnets.0.conv1"]}


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape) * 0.6


def pick(number: int) -> int:
    """A divisor that is neither one nor the number."""
    return next(small for small in (2, 3, 4, number) if number % small == 0)


def kinds(weight: Tensor) -> dict[str, tuple[Tensors, Tensor]]:
    """Kind → (a module's tensors for a weight as files have it, the weight with it merged), by index notation."""
    rows, inputs, *kernel = weight.shape
    area = 9 if kernel == [3, 3] else 4 if kernel else 1
    inner = inputs * area
    up, down = drawn(rows, RANK), drawn(RANK, inner)
    one = {"lora_up.weight": up, "lora_down.weight": down.reshape(RANK, inputs, *kernel), "alpha": torch.tensor(0.5)}
    flat = weight.flatten(1)
    by_lora = flat + 0.25 * torch.einsum("or,ri->oi", up, down)
    magnitude = drawn(rows).abs() + 0.5
    by_row = by_lora * (magnitude / by_lora.pow(2).sum(1).sqrt())[:, None]
    per_input = drawn(inputs).abs() + 0.5
    norms = by_lora.reshape(rows, inputs, -1).pow(2).sum((0, 2)).sqrt()
    by_input = by_lora.reshape(rows, inputs, -1) * (per_input / norms)[None, :, None]
    w1a, w1b, w2a, w2b = drawn(rows, RANK), drawn(RANK, inner), drawn(rows, RANK), drawn(RANK, inner)
    loha = torch.einsum("or,ri,os,si->oi", w1a, w1b, w2a, w2b)
    a, c = pick(rows), pick(inputs)
    small, large = drawn(a, c), drawn(rows // a, inputs // c, *kernel)
    halves = drawn(a, 1), drawn(1, c)
    big = drawn(rows // a, RANK), drawn(RANK, inputs // c * area)
    side = pick(rows)
    blocks = drawn(rows // side, side, side)
    turned = rotated(blocks, flat)
    ga, gb = drawn(inputs, RANK), drawn(RANK, inputs)
    found = {
        "lora": (one, by_lora),
        "dora": ({**one, "dora_scale": magnitude.reshape(-1, *[1] * (weight.dim() - 1))}, by_row),
        "dora by input": ({**one, "dora_scale": per_input.reshape(1, -1, *[1] * len(kernel))}, by_input),
        "loha": (
            {"hada_w1_a": w1a, "hada_w1_b": w1b, "hada_w2_a": w2a, "hada_w2_b": w2b, "alpha": torch.tensor(0.5)},
            flat + 0.25 * loha,
        ),
        "lokr": (
            {"lokr_w1": small, "lokr_w2": large, "alpha": torch.tensor(7.0)},
            flat + torch.einsum("ac,bdk->abcdk", small, large.reshape(rows // a, inputs // c, area)).reshape(rows, -1),
        ),
        "lokr halves": (
            {
                "lokr_w1_a": halves[0],
                "lokr_w1_b": halves[1],
                "lokr_w2_a": big[0],
                "lokr_w2_b": big[1],
                "alpha": torch.tensor(0.5),
            },
            flat
            + 0.25
            * torch.einsum("az,zc,br,rdk->abcdk", *halves, big[0], big[1].reshape(RANK, inputs // c, area)).reshape(
                rows, -1
            ),
        ),
        "glora": (
            {
                "a1.weight": ga,
                "a2.weight": gb,
                "b1.weight": up,
                "b2.weight": down.reshape(RANK, inputs, *kernel),
                "alpha": torch.tensor(0.5),
            },
            flat
            + 0.25
            * (
                torch.einsum("oik,ir,rj->ojk", weight.reshape(rows, inputs, area), ga, gb).reshape(rows, -1) + up @ down
            ),
        ),
        "diff": ({"diff": weight * 0.5}, flat * 1.5),
        "oft": ({"oft_blocks": blocks, "alpha": torch.tensor(0.0)}, turned),
        "oft rescaled": (
            {"oft_blocks": blocks, "rescale": magnitude.reshape(-1, *[1] * (weight.dim() - 1))},
            turned * magnitude[:, None],
        ),
    }
    decomposed = {**found["loha"][0], "dora_scale": magnitude.reshape(-1, *[1] * (weight.dim() - 1))}
    both = found["loha"][1]
    found["loha with a magnitude"] = (decomposed, both * (magnitude / both.pow(2).sum(1).sqrt())[:, None])
    kron = found["lokr"][1]
    found["lokr with a magnitude"] = (
        {**found["lokr"][0], "dora_scale": decomposed["dora_scale"]},
        kron * (magnitude / kron.pow(2).sum(1).sqrt())[:, None],
    )
    if kernel:
        found |= tucker(weight, flat, a, c)
    return {kind: (tensors, new.reshape(weight.shape)) for kind, (tensors, new) in found.items()}


def tucker(weight: Tensor, flat: Tensor, a: int, c: int) -> dict[str, tuple[Tensors, Tensor]]:
    """The forms with a third factor, of convolutions."""
    rows, inputs, *kernel = weight.shape
    up, down, mid = drawn(rows, 3), drawn(RANK, inputs), drawn(3, RANK, *kernel)
    w1a, w1b, t1, w2a, w2b, t2 = (
        drawn(3, rows),
        drawn(RANK, inputs),
        drawn(3, RANK, *kernel),
        drawn(3, rows),
        drawn(RANK, inputs),
        drawn(3, RANK, *kernel),
    )
    small, k2a, k2b, kt = drawn(a, c), drawn(RANK, rows // a), drawn(RANK, inputs // c), drawn(RANK, RANK, *kernel)
    lora = torch.einsum("om,mnxy,ni->oixy", up, mid, down)
    first, second = torch.einsum("mo,mnxy,ni->oixy", w1a, t1, w1b), torch.einsum("mo,mnxy,ni->oixy", w2a, t2, w2b)
    lokr = torch.einsum("ac,mb,mnxy,nd->abcdxy", small, k2a, kt, k2b)
    return {
        "lora of three": (
            {
                "lora_up.weight": up[..., None, None],
                "lora_mid.weight": mid,
                "lora_down.weight": down[..., None, None],
                "alpha": torch.tensor(0.5),
            },
            flat + 0.25 * lora.reshape(rows, -1),
        ),
        "loha of three": (
            {
                "hada_w1_a": w1a,
                "hada_w1_b": w1b,
                "hada_t1": t1,
                "hada_w2_a": w2a,
                "hada_w2_b": w2b,
                "hada_t2": t2,
                "alpha": torch.tensor(0.5),
            },
            flat + 0.25 * (first * second).reshape(rows, -1),
        ),
        "lokr of three": (
            {"lokr_w1": small, "lokr_w2_a": k2a, "lokr_w2_b": k2b, "lokr_t2": kt, "alpha": torch.tensor(0.5)},
            flat + 0.25 * lokr.reshape(rows, -1),
        ),
    }


def rotated(blocks: Tensor, flat: Tensor) -> Tensor:
    """Each block of rows turned by the transposed Cayley transform of the block's skew part."""
    found = []
    for block, rows in zip(blocks, flat.split(len(flat) // len(blocks)), strict=True):
        skew, eye = block - block.T, torch.eye(len(block))
        found.append(((eye + skew) @ torch.linalg.inv(eye - skew)).T @ rows)
    return torch.cat(found)


def of_module(found: States, layers: list[str], swapped: bool, parameter: str = "weight") -> Tensor:
    rows = torch.cat(
        [next(own[f"{name}.{parameter}"] for own in found.values() if f"{name}.{parameter}" in own) for name in layers]
    )
    return torch.cat(rows.chunk(2)[::-1]) if swapped else rows


@pytest.mark.parametrize(
    ("name", "module"), [*(("sd3", module) for module in (*MODULES, *SWAPPED)), *(("sd15", module) for module in UNET)]
)
def test_each_kind_does_what_its_formula_says(
    runs: Callable[[str], Prepared], tmp_path: Path, name: str, module: str
) -> None:
    """On the rows of the file's own module, with multipliers: W + m (W' - W)."""
    torch.manual_seed(3)
    run, layers = runs(name), {**MODULES, **SWAPPED, **UNET}[module]
    modules = modules_of(run)
    before = states(modules)
    weight = of_module(before, layers, module in SWAPPED)
    for kind, (tensors, expected) in kinds(weight).items():
        write_tensors(tmp_path / "x.safetensors", {f"{module}.{key}": x.contiguous() for key, x in tensors.items()})
        for multiplier in (1.0, -0.5):
            merge_into(modules, read_lora(tmp_path / "x.safetensors", run.spec.layers(run.model), multiplier).changes)
            after = states(modules)
            found = of_module(after, layers, module in SWAPPED)
            torch.testing.assert_close(
                found, weight + multiplier * (expected - weight), rtol=2e-4, atol=2e-5, msg=f"{kind} x {multiplier}"
            )
            changed = {
                key for part, own in after.items() for key, x in own.items() if not torch.equal(x, before[part][key])
            }
            assert changed == {f"{layer}.weight" for layer in layers}, kind
            assert float((expected - weight).abs().max()) > 0.02, kind
            for part, own in before.items():
                modules[part].load_state_dict(own)


def test_butterfly_rotations(runs: Callable[[str], Prepared], tmp_path: Path) -> None:
    """BOFT: the second rotation mixes rows that are twice as far apart; the constraint is of all blocks together."""
    torch.manual_seed(3)
    run, layer = runs("sd15"), "down_blocks.0.resnets.0.conv1"
    weight = of_module(states(modules_of(run)), [layer], False)
    blocks, flat = drawn(2, len(weight) // 4, 4, 4), weight.flatten(1)
    skew = blocks - blocks.transpose(-1, -2)
    limit = 0.02 * len(weight)
    assert float(skew.norm()) > limit
    skew = skew * (limit / skew.norm())
    expected = flat
    for number, own in enumerate(skew):
        apart = 2 * 2**number
        order = [
            start + pair * apart + step
            for start in range(0, len(flat), 2 * apart)
            for step in range(apart)
            for pair in range(2)
        ]
        parts = []
        for block, rows in zip(own, expected[order].split(4), strict=True):
            parts.append((torch.eye(4) + block) @ torch.linalg.inv(torch.eye(4) - block) @ rows)
        turned, expected = torch.cat(parts), torch.empty_like(flat)
        expected[order] = turned
    module = next(iter(UNET))
    write_tensors(tmp_path / "x.safetensors", {f"{module}.oft_blocks": blocks, f"{module}.alpha": torch.tensor(0.02)})
    after = of_module(merged_file(run, tmp_path / "x.safetensors"), [layer], False)
    torch.testing.assert_close(after, expected.reshape(weight.shape), rtol=1e-4, atol=1e-5)


def test_biases_norms_and_embeddings_change_too(runs: Callable[[str], Prepared], tmp_path: Path) -> None:
    """LyCORIS' and ComfyUI's differences: of a fused bias, of a norm, of an embedding that T5 has in two places."""
    torch.manual_seed(3)
    run = runs("sd3")
    before = states(modules_of(run))
    qkv = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    bias = drawn(*of_module(before, MODULES[qkv], False, "bias").shape)
    norm = "text_model.encoder.layers.0.layer_norm1"
    width = len(before["text_encoder_1"][f"{norm}.weight"])
    shared = drawn(*before["text_encoder_3"]["shared.weight"].shape)
    w, b = drawn(width), drawn(width)
    write_tensors(
        tmp_path / "x.safetensors",
        {
            f"{qkv}.diff_b": bias,
            f"lora_te1_{norm.replace('.', '_')}.w_norm": w,
            f"lora_te1_{norm.replace('.', '_')}.b_norm": b,
            "text_encoders.t5xxl.transformer.shared.diff": shared,
        },
    )
    after = merged_file(run, tmp_path / "x.safetensors", 0.5)
    torch.testing.assert_close(
        of_module(after, MODULES[qkv], False, "bias"), of_module(before, MODULES[qkv], False, "bias") + 0.5 * bias
    )
    first, own = before["text_encoder_1"], after["text_encoder_1"]
    torch.testing.assert_close(own[f"{norm}.weight"], first[f"{norm}.weight"] + 0.5 * w)
    torch.testing.assert_close(own[f"{norm}.bias"], first[f"{norm}.bias"] + 0.5 * b)
    for key in ("shared.weight", "encoder.embed_tokens.weight"):
        if key in after["text_encoder_3"]:
            torch.testing.assert_close(
                after["text_encoder_3"][key], before["text_encoder_3"]["shared.weight"] + 0.5 * shared
            )


# --- shapes -----------------------------------------------------------------------------------------------------------


Shapes = dict[str, tuple[int, ...]]
NORM = "lora_te1_text_model_encoder_layers_0_layer_norm1"


@dataclass(frozen=True)
class Ground:
    """A model, those of its layers that the headers are for, and headers of every kind."""

    run: Prepared
    modules: dict[str, nn.Module]
    layers: list[Target]
    headers: list[Shapes]


@pytest.fixture(scope="module")
def ground(runs: Callable[[str], Prepared]) -> Ground:
    run = runs("sd3")
    modules = modules_of(run)
    base = states(modules)
    headers: list[Shapes] = [{f"{NORM}.w_norm": (16,), f"{NORM}.b_norm": (16,)}, {f"{NORM}.diff": (16,)}]
    for module, layers in {**MODULES, **SWAPPED}.items():
        for tensors, _ in kinds(of_module(base, layers, False)).values():
            headers.append({f"{module}.{key}": tuple(x.shape) for key, x in tensors.items()})
    keys = [key for header in headers for key in header]
    found = {layer.full_name for module in parse(keys, run.spec.layers(run.model)).modules for layer in module.layers}
    return Ground(run, modules, [x for x in run.spec.layers(run.model) if x.full_name in found], headers)


def answered(ground: Ground, header: Shapes, folder: Path) -> bool:
    """Checks a header as a plan does; what it takes is merged. Whether it took it."""
    listed = Header({key: ("F32", shape) for key, shape in header.items()})
    problem = check_mergeable(listed, ground.layers).problem
    check_adapter_file(folder / "x.safetensors", listed, ground.layers)
    if problem is not None:
        assert "\n" not in problem
        return False
    write_tensors(folder / "x.safetensors", {key: torch.full(shape, 0.01) for key, shape in header.items()})
    merge_into(ground.modules, read_lora(folder / "x.safetensors", ground.layers, 0.5).changes)
    return True


OPTIONAL = ("alpha", "dora_scale", "rescale", "b_norm", "w_norm")


def test_every_single_fault_of_a_header_is_found(ground: Ground, tmp_path: Path) -> None:
    """A tensor left out, a side that is another: refused, but for what may be left out."""
    for header in ground.headers:
        assert answered(ground, header, tmp_path)
        for key, shape in header.items():
            without = {other: own for other, own in header.items() if other != key}
            assert not without or answered(ground, without, tmp_path) == key.endswith(OPTIONAL), (header, key)
            for place, side in enumerate(shape):
                for other in {0, 1, side + 1} - {side}:
                    wrong = {**header, key: (*shape[:place], other, *shape[place + 1 :])}
                    assert not answered(ground, wrong, tmp_path), wrong


NAMES = [
    "lora_up.weight",
    "lora_down.weight",
    "lora_mid.weight",
    "alpha",
    "dora_scale",
    "lora_magnitude_vector",
    "hada_w1_a",
    "hada_t1",
    "hada_t2",
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w2",
    "lokr_w2_b",
    "lokr_t2",
    "oft_R.weight",
    "oft_blocks",
    "rescale",
    "diff",
    "diff_b",
    "w_norm",
    "b_norm",
]
SIDES = st.sampled_from([0, 1, 2, 3, 4, 5, 8, 16, 32, 48, 64, 96])


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_header_is_refused_or_its_file_merges(ground: Ground, data: st.DataObject, tmp_path: Path) -> None:
    """Several faults at once: sides, numbers of sides, tensors left out and added."""
    header = dict(data.draw(st.sampled_from(ground.headers)))
    for _ in range(data.draw(st.integers(0, 2))):
        key = data.draw(st.sampled_from(sorted(header)))
        module = key.split(".")[0]
        match data.draw(st.sampled_from(["side", "drop", "add", "more", "fewer", "swap"])):
            case "side" if header[key]:
                place = data.draw(st.integers(0, len(header[key]) - 1))
                header[key] = (*header[key][:place], data.draw(SIDES), *header[key][place + 1 :])
            case "drop" if len(header) > 1:
                del header[key]
            case "add":
                header[f"{module}.{data.draw(st.sampled_from(NAMES))}"] = tuple(data.draw(st.lists(SIDES, max_size=4)))
            case "more":
                header[key] = (*header[key], 1)
            case "fewer":
                header[key] = header[key][:-1]
            case "swap":
                header[key] = header[key][::-1]
    answered(ground, header, tmp_path)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    header=st.dictionaries(
        st.one_of(
            st.text(max_size=30),
            st.builds(
                "{}{}.{}".format,
                st.sampled_from(["", "lora_unet_", "transformer.", "diffusion_model.", "base_model.model."]),
                st.sampled_from(["joint_blocks.0.x_block.attn.qkv", "transformer_blocks_0_attn_to_q", "x", ""]),
                st.sampled_from(NAMES),
            ),
        ),
        st.tuples(st.sampled_from(["F32", "BF16", "I64", "U8", "F4", ""]), st.lists(SIDES, max_size=5).map(tuple)),
        max_size=8,
    )
)
def test_any_header_is_answered(ground: Ground, header: dict[str, Any]) -> None:
    for skip in (False, True):
        check_mergeable(Header(header), ground.layers, skip)
    check_adapter_file(Path("x"), Header(header), ground.layers)


QKV = "lora_unet_joint_blocks_0_x_block_attn_qkv"
BAD = {
    f"{QKV} has no lora_B": {"lora_down.weight": (2, 16)},
    f"{QKV} has lora_B [16, 2], which must be [48, 2]": {"lora_down.weight": (2, 16), "lora_up.weight": (16, 2)},
    f"{QKV} has hada_w2_a [47, 2], which must be [48, 2]": {
        "hada_w1_a": (48, 2),
        "hada_w1_b": (2, 16),
        "hada_w2_a": (47, 2),
        "hada_w2_b": (2, 16),
    },
    f"{QKV} has lokr_w1 [5, 4], which does not divide 48 x 16": {"lokr_w1": (5, 4), "lokr_w2": (12, 4)},
    f"{QKV} has no lokr_w2": {"lokr_w1": (4, 4)},
    f"{QKV} has diff [16, 48], which must be [48, 16]": {"diff": (16, 48)},
    f"{QKV} has diff_b [16], which must be [48]": {"diff_b": (16,)},
    f"{QKV} is of several kinds (diff, lora)": {
        "diff": (48, 16),
        "lora_down.weight": (2, 16),
        "lora_up.weight": (48, 2),
    },
    f"{QKV} has dora_scale [1, 12], which is of neither the 48 rows nor the 16 inputs": {
        "lora_down.weight": (2, 16),
        "lora_up.weight": (48, 2),
        "dora_scale": (1, 12),
    },
    f"{QKV} has oft_blocks [5, 4, 4], which are no rotations of 48 rows": {"oft_blocks": (5, 4, 4)},
    f"{QKV} has nothing beside alpha": {"alpha": ()},
    f"{QKV} has hada_t1, which is for convolutions": {
        "hada_w1_a": (2, 48),
        "hada_w1_b": (2, 16),
        "hada_w2_a": (2, 48),
        "hada_w2_b": (2, 16),
        "hada_t1": (2, 2),
        "hada_t2": (2, 2),
    },
}


def test_a_plan_names_what_does_not_fit(family_place: Make) -> None:
    """network.base_weights: found when planning, with the module and both shapes."""
    place = family_place("sd3")
    for message, shapes in BAD.items():
        write_tensors(
            place.folder / "bad.safetensors", {f"{QKV}.{key}": torch.zeros(shape) for key, shape in shapes.items()}
        )
        place.write({"network": {"base_weights": ["bad.safetensors:0.5"]}})
        with pytest.raises(InvalidConfig) as caught:
            prepared(place.file)
        own = [item for item in caught.value.diagnostics if "bad.safetensors" in item.message]
        assert [item.message for item in own] == [f"bad.safetensors does not fit: {message}"]
        assert own[0].hint == "name an adapter for Stable Diffusion 3 Medium"
    write_tensors(
        place.folder / "bad.safetensors", {f"{QKV}.diff": torch.zeros(48, 16), "bundle_emb.a.b": torch.zeros(2)}
    )
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.file)
    assert [(item.message, item.hint) for item in caught.value.diagnostics] == [
        (
            "bad.safetensors does not fit: 1 of its tensors are textual inversions, which no layer has (bundle_emb.a.b)",
            "take these out of the file; or take this line out and train on what `runner sample run.toml --checkpoint base "
            "--lora FILE --skip-unknown --save-merged NEW.safetensors` writes",
        )
    ]


def test_what_no_shape_tells(ground: Ground) -> None:
    """Kinds that a layer cannot have, types that hold no real numbers, modules of which a model has a part."""
    pair = {"lora_down.weight": ("F32", (2, 16)), "lora_up.weight": ("BF16", (48, 2))}
    assert (
        check_mergeable(Header({f"{QKV}.{key}": entry for key, entry in pair.items()}), ground.layers).problem is None
    )
    partly = [layer for layer in ground.layers if not layer.name.endswith("attn.to_k")]
    on_norm = {f"{NORM}.lora_down.weight": ("F32", (2, 1)), f"{NORM}.lora_up.weight": ("F32", (16, 2))}
    cases = [
        (partly, pair, f"{QKV} has 3 parts, of which the model has 2"),
        (
            ground.layers,
            {**pair, "lora_up.weight": ("I8", (48, 2))},
            f"{QKV}.lora_up.weight is of type I8, not one of floating point",
        ),
    ]
    for layers, own, message in cases:
        header = Header({f"{QKV}.{key}": entry for key, entry in own.items()})
        assert check_mergeable(header, layers).problem == message
    problem = check_mergeable(Header(on_norm), ground.layers).problem
    assert problem == f"{NORM} is a lora on a norm, which takes differences only"


def test_a_number_that_is_none_is_refused(runs: Callable[[str], Prepared], tmp_path: Path) -> None:
    run = runs("sd3")
    write_tensors(
        tmp_path / "x.safetensors",
        {
            f"{QKV}.lora_down.weight": torch.zeros(2, 16),
            f"{QKV}.lora_up.weight": torch.zeros(48, 2),
            f"{QKV}.alpha": torch.tensor(float("nan")),
        },
    )
    assert check_mergeable(read_header(tmp_path / "x.safetensors"), run.spec.layers(run.model)).problem is None
    with pytest.raises(Invalid, match=r"attn_qkv\.alpha holds NaN or infinite numbers"):
        read_lora(tmp_path / "x.safetensors", run.spec.layers(run.model), 1.0)
