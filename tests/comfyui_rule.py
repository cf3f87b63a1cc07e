"""ComfyUI's own rule for adapter files, written from its sources (comfy/lora.py, utils.py, weight_adapter/): which module
names it knows for a model, and what it makes of a weight. A key that it does not know is only logged there; here it fails.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps


class Place(NamedTuple):
    """A weight, which of its rows, and whether differences have their halves swapped first."""

    key: str
    rows: tuple[int, int] | None = None
    swapped: bool = False


def key_map(family: str, keys: Iterable[str], config: Mapping[str, Any]) -> dict[str, Place]:
    """Module name in a file → weight of the denoiser, whose keys are those of its file in the original layout."""
    own = {hunyuan_name(key) if family == "hunyuan_video" else key: key for key in keys if key.endswith(".weight")}
    found: dict[str, Place] = {}
    for name, key in own.items():
        module = name.removesuffix(".weight")
        found[f"lora_unet_{module.replace('.', '_')}"] = found[f"diffusion_model.{module}"] = Place(key)
    if family in ("sd15", "sdxl"):
        for theirs, original in unet_names(config):
            if f"{original}.weight" in own:
                place = Place(f"{original}.weight")
                found[f"lora_unet_{theirs.replace('.', '_')}"] = found[f"lycoris_{theirs.replace('.', '_')}"] = place
                processed = theirs.replace(".to_", ".processor.to_").removesuffix(
                    ".0" if theirs.endswith("to_out.0") else ""
                )
                found[processed] = found[f"unet.{processed}"] = place
    if family == "sd3":
        for theirs, place in mmdit_names(config["num_layers"]):
            dashed = theirs.replace(".", "_")
            for name in (
                f"transformer.{theirs}",
                f"base_model.model.{theirs}",
                f"lora_transformer_{dashed}",
                f"lycoris_{dashed}",
            ):
                found[name] = place
    if family in ("flux1", "chroma"):
        for theirs, place in flux_names(config):
            dashed = theirs.replace(".", "_")
            for name in (f"transformer.{theirs}", f"lora_transformer_{dashed}", f"lycoris_{dashed}"):
                found[name] = place
    if family == "hunyuan_video":
        for name, key in own.items():
            old = re.sub(r"(_mod|\.modulation)\.lin$", r"\1.linear", name.removesuffix(".weight"))
            old = old.replace("_attn.qkv", "_attn_qkv").replace("_attn.proj", "_attn_proj")
            old = re.sub(r"mlp\.0$", "mlp.fc1", re.sub(r"mlp\.2$", "mlp.fc2", old))
            found[f"diffusion_model.{old}"] = found[f"transformer.{old}"] = Place(key)
    return found


def hunyuan_name(key: str) -> str:
    """The name of a tensor of HunyuanVideo's file inside ComfyUI."""
    for old, new in (
        ("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."),
        ("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."),
        ("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."),
        ("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."),
        ("_mod.linear.", "_mod.lin."),
        ("_attn_qkv.", "_attn.qkv."),
        ("mlp.fc1.", "mlp.0."),
        ("mlp.fc2.", "mlp.2."),
        ("_attn_proj.", "_attn.proj."),
        (".modulation.linear.", ".modulation.lin."),
        ("_in.mlp.2.", "_in.out_layer."),
        ("_in.mlp.0.", "_in.in_layer."),
    ):
        key = key.replace(old, new)
    return key


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = ("attn1", "attn2")


def unet_names(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(diffusers name, original name) of the modules of a U-Net."""
    count, blocks = config["layers_per_block"], len(config["block_out_channels"])
    depths = config.get("transformer_layers_per_block", 1)
    depths = [depths] * blocks if isinstance(depths, int) else list(depths)
    down = [depth if "CrossAttn" in kind else 0 for depth, kind in zip(depths, config["down_block_types"], strict=True)]

    def block(theirs: str, index: int, original: str, depth: int) -> Iterator[tuple[str, str]]:
        for name, other in _RESNET.items():
            yield f"{theirs}.resnets.{index}.{name}", f"{original}.0.{other}"
        if depth:
            yield from transformer(f"{theirs}.attentions.{index}", f"{original}.1", depth)

    def transformer(theirs: str, original: str, depth: int) -> Iterator[tuple[str, str]]:
        inner = [f"{attention}.{part}" for attention in _ATTENTION for part in ("to_q", "to_k", "to_v", "to_out.0")]
        inner += ["ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"]
        names = ["proj_in", "proj_out", "norm"]
        names += [f"transformer_blocks.{index}.{name}" for index in range(depth) for name in inner]
        yield from ((f"{theirs}.{name}", f"{original}.{name}") for name in names)

    yield from (("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"))
    for number, place in ((1, 0), (2, 2)):
        yield f"time_embedding.linear_{number}", f"time_embed.{place}"
        yield f"add_embedding.linear_{number}", f"label_emb.0.{place}"
    for x in range(blocks):
        n = 1 + (count + 1) * x
        for index in range(count):
            yield from block(f"down_blocks.{x}", index, f"input_blocks.{n + index}", down[x])
        yield f"down_blocks.{x}.downsamplers.0.conv", f"input_blocks.{n + count}.0.op"
    yield from transformer("mid_block.attentions.0", "middle_block.1", depths[-1])
    for index, place in enumerate((0, 2)):
        for name, other in _RESNET.items():
            yield f"mid_block.resnets.{index}.{name}", f"middle_block.{place}.{other}"
    for x in range(blocks):
        n, depth = (count + 1) * x, down[blocks - 1 - x]
        for index in range(count + 1):
            yield from block(f"up_blocks.{x}", index, f"output_blocks.{n + index}", depth)
        yield f"up_blocks.{x}.upsamplers.0.conv", f"output_blocks.{n + count}.{2 if depth else 1}.conv"


_MMDIT = {
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
}


def mmdit_names(depth: int, width: int = 64) -> Iterator[tuple[str, Place]]:
    """(diffusers name, weight) of the modules of SD3's transformer, whose width is 64 times its depth."""
    size = depth * width
    for index in range(depth):
        theirs, original = f"transformer_blocks.{index}", f"joint_blocks.{index}"
        for part, (image, text) in enumerate((("to_q", "add_q_proj"), ("to_k", "add_k_proj"), ("to_v", "add_v_proj"))):
            rows = (part * size, size)
            yield f"{theirs}.attn.{image}", Place(f"{original}.x_block.attn.qkv.weight", rows)
            yield f"{theirs}.attn.{text}", Place(f"{original}.context_block.attn.qkv.weight", rows)
        for own, name in _MMDIT.items():
            last = name == "norm1_context.linear" and index == depth - 1
            yield f"{theirs}.{name}", Place(f"{original}.{own}.weight", None, last)
    yield "norm_out.linear", Place("final_layer.adaLN_modulation.1.weight", None, True)
    yield "proj_out", Place("final_layer.linear.weight")
    yield "context_embedder", Place("context_embedder.weight")
    for name, own in (("timestep_embedder", "t_embedder"), ("text_embedder", "y_embedder")):
        for number, place in ((1, 0), (2, 2)):
            yield f"time_text_embed.{name}.linear_{number}", Place(f"{own}.mlp.{place}.weight")


_FLUX = {
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "txt_mod.lin": "norm1_context.linear",
}
_FLUX_OUTER = {
    "final_layer.linear": "proj_out",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
}


def flux_names(config: Mapping[str, Any]) -> Iterator[tuple[str, Place]]:
    """(diffusers name, weight) of the modules of FLUX.1's transformer."""
    size = config["num_attention_heads"] * config["attention_head_dim"]
    for index in range(config["num_layers"]):
        theirs, original = f"transformer_blocks.{index}", f"double_blocks.{index}"
        for part, (image, text) in enumerate((("to_q", "add_q_proj"), ("to_k", "add_k_proj"), ("to_v", "add_v_proj"))):
            yield f"{theirs}.attn.{image}", Place(f"{original}.img_attn.qkv.weight", (part * size, size))
            yield f"{theirs}.attn.{text}", Place(f"{original}.txt_attn.qkv.weight", (part * size, size))
        for own, name in _FLUX.items():
            yield f"{theirs}.{name}", Place(f"{original}.{own}.weight")
    for index in range(config["num_single_layers"]):
        theirs, original = f"single_transformer_blocks.{index}", f"single_blocks.{index}"
        for part, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v")):
            yield f"{theirs}.{name}", Place(f"{original}.linear1.weight", (part * size, size))
        yield f"{theirs}.proj_mlp", Place(f"{original}.linear1.weight", (3 * size, 4 * size))
        yield f"{theirs}.norm.linear", Place(f"{original}.modulation.lin.weight")
        yield f"{theirs}.proj_out", Place(f"{original}.linear2.weight")
    for own, name in _FLUX_OUTER.items():
        yield name, Place(f"{own}.weight")
    yield "norm_out.linear", Place("final_layer.adaLN_modulation.1.weight", None, True)


_CLIP = ("mlp.fc1", "mlp.fc2", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")


def text_key_map(family: str, encoders: Mapping[str, Iterable[str]]) -> dict[str, Place]:
    """Module name in a file → `component.key` of a text encoder in transformers' names."""
    found: dict[str, Place] = {}
    for number, (name, keys) in enumerate(sorted(encoders.items()), 1):
        for key in keys:
            module = key.removesuffix(".weight")
            clip = re.search(r"encoder\.layers\.(\d+)\.(.*)$", module)
            if clip and clip.group(2) in _CLIP:
                short = f"text_model_encoder_layers_{clip.group(1)}_{clip.group(2).replace('.', '_')}"
                for prefix in (f"lora_te{number}_", *(["lora_te_"] if number == 1 else [])):
                    found[prefix + short] = Place(f"{name}.{key}")
            elif module == "text_projection" and number < 3:
                found[f"lora_te{number}_text_projection"] = Place(f"{name}.{key}")
            elif family in ("sd3", "flux1", "chroma") and not clip and "block." in module:
                # T5 is the last; behind CLIP-L alone it has two numbers
                for own in (number, 3):
                    found[f"lora_te{own}_{module.replace('.', '_')}"] = Place(f"{name}.{key}")
    return found


def applied(
    file: Mapping[str, Tensor], places: Mapping[str, Place], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights with the file's patches at strength 1. Fails on a module that is not known and on a key that is not used."""
    result = {key: weight.clone() for key, weight in weights.items()}
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in file.items():
        name = next(
            (
                module
                for module in (key.rpartition(".")[0], key.rpartition(".")[0].rpartition(".")[0])
                if module in places
            ),
            None,
        )
        assert name is not None, f"lora key not loaded: {key}"
        modules.setdefault(name, {})[key.removeprefix(f"{name}.")] = tensor
    for name, tensors in modules.items():
        place = places[name]
        weight = result[place.key]
        part = weight if place.rows is None else weight.narrow(0, *place.rows)
        difference, scale = _difference(tensors)
        dora = tensors.pop("dora_scale", None)
        assert not tensors, f"{name}: not used: {sorted(tensors)}"
        difference = difference.reshape(part.shape)
        if place.swapped:
            difference = torch.cat(difference.chunk(2)[::-1])
        changed = part + difference * scale
        if dora is not None:
            assert dora.shape[0] == part.shape[0]
            norm = part.flatten(1).norm(dim=1).reshape(-1, *[1] * (part.dim() - 1)) + EPS
            changed = changed * (dora / norm)
        part.copy_(changed)
    return result


def _difference(tensors: dict[str, Tensor]) -> tuple[Tensor, float]:
    alpha = tensors.pop("alpha", None)

    def scaled(rank: int | None) -> float:
        return float(alpha) / rank if alpha is not None and rank else 1.0

    if "lora_up.weight" in tensors:
        up, down = tensors.pop("lora_up.weight"), tensors.pop("lora_down.weight")
        return up.flatten(1) @ down.flatten(1), scaled(down.shape[0])
    if "hada_w1_a" in tensors:
        first_b = tensors.pop("hada_w1_b")
        first, second = tensors.pop("hada_w1_a") @ first_b, tensors.pop("hada_w2_a") @ tensors.pop("hada_w2_b")
        return first * second, scaled(first_b.shape[0])
    if "lokr_w1" in tensors:
        first, rank = tensors.pop("lokr_w1"), None
        if "lokr_w2" in tensors:
            second = tensors.pop("lokr_w2")
        else:
            low = tensors.pop("lokr_w2_b")
            second, rank = tensors.pop("lokr_w2_a") @ low, low.shape[0]
        first = first[..., None, None] if second.dim() == 4 else first
        return torch.kron(first, second), scaled(rank)
    return tensors.pop("diff"), 1.0
