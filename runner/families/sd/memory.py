"""Predicted activations of the U-Net, by counting.

While training, autograd keeps what the backward pass needs. `_saved` walks the layers in the order of the forward pass
and adds what each kind of layer keeps (its input where it is trained or carries an adapter, a norm's input, SiLU's and
GEGLU's inputs, attention's query, key, value and output).
"""

from __future__ import annotations

from collections.abc import Iterator

from runner.families.parts.memory import Use
from runner.model.layers import Layer

LIVE_UNET = 2.0
"""Tensors of the widest layer's output that live at once in a forward pass without gradients, beside the skips."""


def saved(layers: list[Layer], use: Use) -> Iterator[tuple[Layer, float]]:
    """(layer, numbers that autograd keeps for it). Before the first layer that trains nothing is kept."""
    active = False
    for layer in layers:
        trains = use.whole or layer.name in use.targets
        is_text = ".attn2.to_k" in layer.name or ".attn2.to_v" in layer.name
        active = active or trains or (is_text and use.text_grad)
        yield layer, _kept(layer, use, trains, is_text) if active else 0.0


def _kept(layer: Layer, use: Use, trains: bool, is_text: bool) -> float:
    positions = use.batch * use.tokens if is_text else use.positions(layer)
    if "time_emb" in layer.name:
        positions = use.batch
    kept = float(use.targets.get(layer.name, 0) * positions)  # between the adapter's two halves
    name = layer.name
    if layer.kind == "norm":
        kept += layer.inputs * positions
        if ".transformer_blocks." not in name and not name.endswith(".norm"):
            kept += layer.outputs * positions  # SiLU's input
        return kept
    shares_input = name.endswith((".to_k", ".to_v"))
    shortcut = name.endswith(".conv_shortcut")
    if (
        trains or layer.kernel > 1 or shortcut
    ) and not shares_input:  # autograd keeps a convolution's input even where it is frozen
        kept += layer.inputs * (use.positions(layer) * 4 if "downsamplers" in name else positions)
    if name.endswith((".to_q", ".to_k", ".to_v")):
        kept += layer.outputs * positions
        if name.endswith(".to_q") and use.eager:
            other = use.tokens if ".attn2." in name else max(1, use.area // 4**layer.level)
            kept += 2 * positions * other * use.heads
    if name.endswith(".to_out.0"):
        kept += layer.inputs * positions
    if name.endswith(".ff.net.0.proj"):
        kept += 1.5 * layer.outputs * positions  # both halves of GEGLU, and GELU of the gate
    return kept


def forward(layers: list[Layer], use: Use) -> float:
    """A denoising step without gradients: the skips, and the tensors around the widest layer."""
    widest = max(layer.outputs * use.positions(layer) for layer in layers)
    skips = sum(
        layer.outputs * use.positions(layer)
        for layer in layers
        if layer.name.startswith("down_blocks") and layer.name.endswith((".conv2", "downsamplers.0.conv"))
    )
    return (LIVE_UNET * widest + skips) * use.number
