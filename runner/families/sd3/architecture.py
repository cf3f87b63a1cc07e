"""The layers of SD3Transformer2DModel (MMDiT, arXiv 2403.03206) in the order of the forward pass; torch-free.

In the original layout q, k and v of each stream are one tensor, and where a modulation has only a shift and a scale
(the last context block, the final layer) they stand the other way round. Stable Diffusion 3.5 normalises queries and keys,
and the first blocks of its medium model have a second attention, of the picture alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from runner.families.parts.layers import Config, Layer


def mmdit_layers(config: Config) -> list[Layer]:
    """The layers of the transformer."""
    return list(_mmdit(config))


def fitted(config: Config, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Config:
    """The architecture of a file: its width and depth, and what Stable Diffusion 3.5 has more."""
    found: dict[str, Any] = dict(config)
    depth, dual = 0, set()
    for key, (_, shape) in tensors.items():
        block = _BLOCK.search(key)
        if block is not None:
            depth = max(depth, int(block[1]) + 1)
            dual |= {int(block[1])} if "attn2." in key else set()
        elif key.endswith("context_embedder.weight") and len(shape) == 2:
            heads = shape[0] // config["attention_head_dim"]
            found |= {"num_attention_heads": heads, "caption_projection_dim": shape[0]}
        elif key.endswith("pos_embed") and len(shape) == 3:
            found["pos_embed_max_size"] = int(shape[1] ** 0.5)
    if not depth:
        return config
    normed = any(key.endswith((".ln_q.weight", ".attn.norm_q.weight")) for key in tensors)
    more = {"qk_norm": "rms_norm", "dual_attention_layers": sorted(dual)} if normed else {}
    return {**found, "num_layers": depth, **more}


_BLOCK = re.compile(r"(?:^|\.)(?:joint|transformer)_blocks\.(\d{1,4})\.")


def width_of(config: Config) -> int:
    """Numbers of one token inside the transformer."""
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def _mmdit(config: Config) -> Iterator[Layer]:
    width, patch = width_of(config), config["patch_size"]
    channels = config["in_channels"]
    yield Layer("pos_embed.pos_embed", "pos_embed", "table", width, config["pos_embed_max_size"] ** 2, suffix="")
    yield Layer("pos_embed.proj", "x_embedder.proj", "conv", channels, width, patch)
    for name, original, inputs in (
        ("time_text_embed.timestep_embedder", "t_embedder", 256),
        ("time_text_embed.text_embedder", "y_embedder", config["pooled_projection_dim"]),
    ):
        yield Layer(f"{name}.linear_1", f"{original}.mlp.0", "linear", inputs, width)
        yield Layer(f"{name}.linear_2", f"{original}.mlp.2", "linear", width, width)
    yield Layer(
        "context_embedder",
        "context_embedder",
        "linear",
        config["joint_attention_dim"],
        config["caption_projection_dim"],
    )
    last = config["num_layers"] - 1
    for index in range(config["num_layers"]):
        yield from _block(index, width, index == last, config)
    yield Layer("norm_out.linear", "final_layer.adaLN_modulation.1", "linear", width, 2 * width, swapped=True)
    yield Layer("proj_out", "final_layer.linear", "linear", width, patch**2 * config["out_channels"])


def _block(index: int, width: int, last: bool, config: Config) -> Iterator[Layer]:
    ours, x, context = (
        f"transformer_blocks.{index}",
        f"joint_blocks.{index}.x_block",
        f"joint_blocks.{index}.context_block",
    )
    dual = index in (config.get("dual_attention_layers") or ())
    head = config["attention_head_dim"] if config.get("qk_norm") else 0
    yield Layer(f"{ours}.norm1.linear", f"{x}.adaLN_modulation.1", "linear", width, (9 if dual else 6) * width)
    yield Layer(
        f"{ours}.norm1_context.linear", f"{context}.adaLN_modulation.1", "linear", width, (2 if last else 6) * width,
        swapped=last,
    )  # fmt: skip
    for names, original in ((("to_q", "to_k", "to_v"), x), (("add_q_proj", "add_k_proj", "add_v_proj"), context)):
        for part, name in enumerate(names):
            yield Layer(f"{ours}.attn.{name}", f"{original}.attn.qkv", "linear", width, width, part=(part, 3))
        yield from _norms(f"{ours}.attn.norm{'' if original == x else '_added'}_", f"{original}.attn.ln_", head)
    yield Layer(f"{ours}.attn.to_out.0", f"{x}.attn.proj", "linear", width, width)
    if not last:
        yield Layer(f"{ours}.attn.to_add_out", f"{context}.attn.proj", "linear", width, width)
    if dual:
        for part, name in enumerate(("to_q", "to_k", "to_v")):
            yield Layer(f"{ours}.attn2.{name}", f"{x}.attn2.qkv", "linear", width, width, part=(part, 3))
        yield from _norms(f"{ours}.attn2.norm_", f"{x}.attn2.ln_", head)
        yield Layer(f"{ours}.attn2.to_out.0", f"{x}.attn2.proj", "linear", width, width)
    streams = [("ff", x)] if last else [("ff", x), ("ff_context", context)]
    for name, original in streams:
        yield Layer(f"{ours}.{name}.net.0.proj", f"{original}.mlp.fc1", "linear", width, 4 * width)
        yield Layer(f"{ours}.{name}.net.2", f"{original}.mlp.fc2", "linear", 4 * width, width)


def _norms(ours: str, original: str, head: int) -> Iterator[Layer]:
    """Of queries and keys, where there are any."""
    for letter in "qk" if head else "":
        yield Layer(f"{ours}{letter}", f"{original}{letter}", "norm", head, head, bias=False)
