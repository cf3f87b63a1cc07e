"""The layers of SD3Transformer2DModel (MMDiT, arXiv 2403.03206) in the order of the forward pass; torch-free.

In the original layout q, k and v of each stream are one tensor, and where a modulation has only a shift and a scale
(the last context block, the final layer) they stand the other way round. Stable Diffusion 3.5 normalises queries and keys,
and the first blocks of its medium model have a second attention, of the picture alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from runner.model.layers import Config, Layer


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
    yield Layer(
        name="pos_embed.pos_embed",
        original="pos_embed",
        kind="table",
        inputs=width,
        outputs=config["pos_embed_max_size"] ** 2,
        suffix="",
    )
    yield Layer(
        name="pos_embed.proj", original="x_embedder.proj", kind="conv", inputs=channels, outputs=width, kernel=patch
    )
    for name, original, inputs in (
        ("time_text_embed.timestep_embedder", "t_embedder", 256),
        ("time_text_embed.text_embedder", "y_embedder", config["pooled_projection_dim"]),
    ):
        yield Layer(name=f"{name}.linear_1", original=f"{original}.mlp.0", kind="linear", inputs=inputs, outputs=width)
        yield Layer(name=f"{name}.linear_2", original=f"{original}.mlp.2", kind="linear", inputs=width, outputs=width)
    yield Layer(
        name="context_embedder",
        original="context_embedder",
        kind="linear",
        inputs=config["joint_attention_dim"],
        outputs=config["caption_projection_dim"],
    )
    last = config["num_layers"] - 1
    for index in range(config["num_layers"]):
        yield from _block(index, width, index == last, config)
    yield Layer(
        name="norm_out.linear",
        original="final_layer.adaLN_modulation.1",
        kind="linear",
        inputs=width,
        outputs=2 * width,
        swapped=True,
    )
    yield Layer(
        name="proj_out",
        original="final_layer.linear",
        kind="linear",
        inputs=width,
        outputs=patch**2 * config["out_channels"],
    )


def _block(index: int, width: int, last: bool, config: Config) -> Iterator[Layer]:
    ours, x, context = (
        f"transformer_blocks.{index}",
        f"joint_blocks.{index}.x_block",
        f"joint_blocks.{index}.context_block",
    )
    dual = index in (config.get("dual_attention_layers") or ())
    head = config["attention_head_dim"] if config.get("qk_norm") else 0
    yield Layer(
        name=f"{ours}.norm1.linear",
        original=f"{x}.adaLN_modulation.1",
        kind="linear",
        inputs=width,
        outputs=(9 if dual else 6) * width,
    )
    yield Layer(
        name=f"{ours}.norm1_context.linear",
        original=f"{context}.adaLN_modulation.1",
        kind="linear",
        inputs=width,
        outputs=(2 if last else 6) * width,
        swapped=last,
    )
    for names, original in ((("to_q", "to_k", "to_v"), x), (("add_q_proj", "add_k_proj", "add_v_proj"), context)):
        for part, name in enumerate(names):
            yield Layer(
                name=f"{ours}.attn.{name}",
                original=f"{original}.attn.qkv",
                kind="linear",
                inputs=width,
                outputs=width,
                part=(part, 3),
            )
        yield from _norms(f"{ours}.attn.norm{'' if original == x else '_added'}_", f"{original}.attn.ln_", head)
    yield Layer(name=f"{ours}.attn.to_out.0", original=f"{x}.attn.proj", kind="linear", inputs=width, outputs=width)
    if not last:
        yield Layer(
            name=f"{ours}.attn.to_add_out", original=f"{context}.attn.proj", kind="linear", inputs=width, outputs=width
        )
    if dual:
        for part, name in enumerate(("to_q", "to_k", "to_v")):
            yield Layer(
                name=f"{ours}.attn2.{name}",
                original=f"{x}.attn2.qkv",
                kind="linear",
                inputs=width,
                outputs=width,
                part=(part, 3),
            )
        yield from _norms(f"{ours}.attn2.norm_", f"{x}.attn2.ln_", head)
        yield Layer(
            name=f"{ours}.attn2.to_out.0", original=f"{x}.attn2.proj", kind="linear", inputs=width, outputs=width
        )
    streams = [("ff", x)] if last else [("ff", x), ("ff_context", context)]
    for name, original in streams:
        yield Layer(
            name=f"{ours}.{name}.net.0.proj",
            original=f"{original}.mlp.fc1",
            kind="linear",
            inputs=width,
            outputs=4 * width,
        )
        yield Layer(
            name=f"{ours}.{name}.net.2", original=f"{original}.mlp.fc2", kind="linear", inputs=4 * width, outputs=width
        )


def _norms(ours: str, original: str, head: int) -> Iterator[Layer]:
    """Of queries and keys, where there are any."""
    for letter in "qk" if head else "":
        yield Layer(
            name=f"{ours}{letter}", original=f"{original}{letter}", kind="norm", inputs=head, outputs=head, bias=False
        )
