"""Predicted activations of transformers with two streams (HunyuanVideo, FramePack, FLUX.1, Chroma), by counting, in the order
of the forward pass.

Positions are patches of all frames, those of the history included, and text tokens; a modulation has one per item.
"""

from __future__ import annotations

from collections.abc import Iterator

from runner.families.parts.memory import Use
from runner.model.layers import Layer

PATCH_AREA = 4
LIVE_FORWARD = 10.0
"""Tensors of the joint sequence's width that live at once without gradients: q, k, v, output, the MLP's inside."""
_CONTEXT = (".add_q_proj", ".add_k_proj", ".add_v_proj", ".to_add_out")
_ONCE = ("time_text_embed", "norm1.linear", "norm1_context.linear", ".norm.linear", "norm_out.linear")


def saved(layers: list[Layer], use: Use) -> Iterator[tuple[Layer, float]]:
    """(layer, numbers that autograd keeps for it). Before the first layer that trains nothing is kept."""
    active = False
    for layer in layers:
        trains = use.whole or layer.name in use.targets
        active = active or trains
        yield layer, _kept(layer, use, trains) if active else 0.0


def _kept(layer: Layer, use: Use, trains: bool) -> float:
    positions, name = _positions(layer, use), layer.name
    kept = float(use.targets.get(name, 0) * positions)  # between the adapter's two halves
    if any(part in name for part in _ONCE):
        return kept + layer.inputs * (use.batch if trains else 0)
    if name.endswith((".norm_q", ".norm_k", ".norm_added_q", ".norm_added_k")):  # both streams' heads, before and after
        return kept + 2.0 * use.width * positions
    if name.endswith((".to_q", ".add_q_proj")):  # the stream's input, its norm's, the modulated one; shared by k and v
        kept += 3.0 * layer.inputs * positions
    if name.endswith((".to_q", ".to_k", ".to_v", *_CONTEXT[:3])):
        kept += layer.outputs * positions
        if name.endswith(".to_q") and use.eager:
            joint = use.area // PATCH_AREA + use.tokens
            kept += 2.0 * use.batch * joint * joint * use.heads
    elif name.endswith((".to_out.0", ".to_add_out")):
        kept += (layer.inputs + layer.outputs) * positions  # attention's output; the gated projection
    elif name.endswith((".net.0.proj", ".proj_mlp")):
        kept += (3.0 * layer.inputs + layer.outputs) * positions  # norm, modulation, input; GELU's input
    elif name.endswith((".net.2", ".proj_out")):
        kept += (layer.inputs + layer.outputs) * positions
    elif trains:
        kept += layer.inputs * positions
    return kept


def _positions(layer: Layer, use: Use) -> int:
    name = layer.name
    if any(part in name for part in _ONCE):
        return use.batch
    picture, text = use.batch * max(1, use.area // PATCH_AREA), use.batch * use.tokens
    if (
        name.endswith(_CONTEXT)
        or "ff_context" in name
        or "norm_added" in name
        or name.startswith(("context_embedder", "image_"))
    ):
        return text
    return picture + text if name.startswith("single_") else picture


def widest(layers: list[Layer], use: Use) -> float:
    """The MLP's inside; modulations have one row an item."""
    inner = max(layer.outputs for layer in layers if layer.name.endswith((".net.0.proj", ".proj_mlp")))
    return float(inner * use.batch * (use.area // PATCH_AREA + use.tokens))


def entering(first: Layer, use: Use) -> float:
    """Both streams' tokens."""
    return float(use.width * use.batch * (use.area // PATCH_AREA + use.tokens))


def forward(layers: list[Layer], use: Use) -> float:
    """A denoising step without gradients: the tensors around one block."""
    return LIVE_FORWARD * use.width * use.batch * (use.area // PATCH_AREA + use.tokens) * use.number
