"""Predicted activations of the MMDiT, by counting, in the order of the forward pass.

Positions are pictures' patches in the x stream and text tokens in the context stream; a modulation has one per item.
"""

from __future__ import annotations

from collections.abc import Iterator

from runner.families.parts.memory import Use
from runner.model.layers import Layer

PATCH_AREA = 4
LIVE_FORWARD = 8.0
"""Tensors of the joint sequence's width that live at once without gradients: q, k, v, output, the MLP's inside."""
_CONTEXT = (".add_q_proj", ".add_k_proj", ".add_v_proj", ".to_add_out", ".norm_added_q", ".norm_added_k")


def saved(layers: list[Layer], use: Use) -> Iterator[tuple[Layer, float]]:
    """(layer, numbers that autograd keeps for it). Before the first layer that trains nothing is kept."""
    active = False
    for layer in layers:
        trains = use.whole or layer.name in use.targets
        active = active or trains or (use.text_grad and layer.name == "context_embedder")
        yield layer, _kept(layer, use, trains) if active else 0.0


def _kept(layer: Layer, use: Use, trains: bool) -> float:
    positions = _positions(layer, use)
    name = layer.name
    kept = float(use.targets.get(name, 0) * positions)  # between the adapter's two halves
    if ".attn" in name and layer.kind == "norm":  # of queries and keys: all heads, before and after
        return kept + 2.0 * use.width * positions
    if layer.kind == "table" or "time_text_embed" in name or "norm" in name:
        return kept + layer.inputs * (use.batch if trains else 0)
    if name.endswith((".to_q", ".add_q_proj")):  # the stream's input, its norm's, the modulated one; shared by k and v
        kept += 3.0 * layer.inputs * positions
    if name.endswith((".to_q", ".to_k", ".to_v", *_CONTEXT[:3])):
        kept += layer.outputs * positions
        if name.endswith(".to_q") and use.eager:
            joint = use.area // PATCH_AREA + use.tokens
            kept += 2.0 * use.batch * joint * joint * use.heads
    elif name.endswith((".to_out.0", ".to_add_out")):
        kept += (layer.inputs + layer.outputs) * positions  # attention's output; the gated projection
    elif name.endswith(".net.0.proj"):
        kept += (3.0 * layer.inputs + layer.outputs) * positions  # norm, modulation, input; GELU's input
    elif name.endswith(".net.2"):
        kept += (layer.inputs + layer.outputs) * positions
    elif trains:
        kept += layer.inputs * positions
    return kept


def _positions(layer: Layer, use: Use) -> int:
    if "time_text_embed" in layer.name or "norm1" in layer.name or "norm_out" in layer.name:
        return use.batch
    if layer.name.endswith(_CONTEXT) or "ff_context" in layer.name or layer.name == "context_embedder":
        return use.batch * use.tokens
    return use.batch * max(1, use.area // PATCH_AREA)


def forward(layers: list[Layer], use: Use) -> float:
    """A denoising step without gradients: the tensors around one block."""
    width = next(layer.outputs for layer in layers if layer.name == "pos_embed.proj")
    return LIVE_FORWARD * width * use.batch * (use.area // PATCH_AREA + use.tokens) * use.number
