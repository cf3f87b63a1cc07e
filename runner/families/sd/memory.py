"""Predicted peak memory of the SD families: weights and optimizer states exactly, activations by counting.

While training, autograd keeps what the backward pass needs. `_saved` walks the U-Net's layers in the order of the forward
pass and adds what each kind of layer keeps (its input where it is trained or carries an adapter, a norm's input, SiLU's
and GEGLU's inputs, attention's query, key, value and output). The backward pass then frees these tensors while gradients
grow, and the peak is found by walking back. Without gradients only the tensors around the widest layer live at once.
docs/performance.md says how far this is from measured peaks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from runner.families.sd.architecture import Layer, clip_layers, unet_layers, vae_layers
from runner.families.spec import Component, MemoryAnswer, MemoryQuestion

BASE = 30_000_000
"""What any phase takes beside tensors: threads, allocator, buffers of files."""
TRAIN_BASE = 20_000_000
"""What training takes beside that: autograd, the loader's threads, the log."""
SCORED_TOGETHER = 8
"""Noise levels that stable loss measures in one batch (stages/score.py)."""
GUIDED = 2
"""Rows of a guided denoising step: with the prompt and without."""
LIVE_UNET = 2.0
"""Tensors of the widest layer's output that live at once in a forward pass without gradients, beside the skips."""
LIVE_VAE = 5.0
"""The same for the autoencoder, whose convolutions keep reordered copies of their input and output."""
LIVE_BACKWARD = 2.0
"""Tensors of the widest layer's output that the backward pass needs at a time."""
HEAP = 0.5
"""On the CPU: what the C library's heap takes beyond the kept tensors while gradients come and go between them, as a
share of those tensors. A GPU's caching allocator reuses its blocks instead."""
LOADED = 1.06
"""On the CPU: what a module of many small tensors takes of the heap against their bytes."""


@dataclass(frozen=True)
class _Use:
    """How a U-Net or text encoder is used: sizes in positions (batch included) and the bytes of a number."""

    batch: int
    area: int
    """Latent positions of one picture."""
    tokens: int
    """Text tokens of one caption."""
    number: int
    whole: bool
    targets: Mapping[str, int]
    """Layer → rank."""
    text_grad: bool = False
    eager: bool = False
    heads: int = 8

    def positions(self, layer: Layer) -> int:
        return self.batch * max(1, self.area // 4**layer.level)


def predict_memory(question: MemoryQuestion) -> MemoryAnswer:
    """Bytes of each phase above the libraries' own."""
    parts, ask = question.model.components, question
    area = prod(ask.size)
    phases: dict[str, float] = {}
    vae = parts["vae"].parameters * ask.frozen_bytes
    text = parts["text_encoder_1"].parameters * ask.frozen_bytes
    if ask.encodes_latents:
        phases["cache.latents"] = vae + _vae_working(parts["vae"], area, ask.latent_batch, "encoder", ask.frozen_bytes)
    if ask.encodes_text:
        phases["cache.text"] = text + _text_working(parts["text_encoder_1"], ask)
    weights = _resident(ask)
    phases["train"] = TRAIN_BASE + _train(ask, weights)
    denoiser = weights["denoiser"] + weights["text_encoder_1"] + (0 if ask.whole else ask.trainable * 4)
    if ask.sample_size is not None:
        phases["sample"] = denoiser + _picture(ask, ask.sample_size)
    if ask.whole:  # the trained modules, the checkpoint that is put into them, and the exported copy
        phases["publish"] = 2 * sum(weights.values()) + 2 * sum(part.parameters for part in parts.values())
    phases["select"] = denoiser + _forward(parts["denoiser"], _use(ask, SCORED_TOGETHER, area))
    return MemoryAnswer({name: BASE + int(size) for name, size in phases.items()})


def _resident(ask: MemoryQuestion) -> dict[str, int]:
    """Bytes of the modules that stay while training: frozen ones in their dtype, those that train whole in fp32."""
    found = {"denoiser": 0, "text_encoder_1": 0}
    for name in found:
        parameters = ask.model.components[name].parameters
        if name == "denoiser" or name in ask.trains:
            held = parameters * (4 if ask.trains.get(name) else ask.frozen_bytes)
            found[name] = int(held * LOADED) if ask.device == "cpu" else held
    return found


def _train(ask: MemoryQuestion, weights: Mapping[str, int]) -> float:
    parts = ask.model.components
    held: float = sum(weights.values()) + (0 if ask.whole else ask.trainable * 4)
    held += ask.trainable * (ask.optimizer_bytes + (4 if ask.ema else 0))
    if not ask.text_cached and "text_encoder_1" not in ask.trains:
        held += parts["text_encoder_1"].parameters * ask.frozen_bytes
    if not ask.latents_cached:
        held += parts["vae"].parameters * ask.frozen_bytes
    if ask.compute_bytes < 4:  # autocast keeps a copy of each weight that is wider, until the step ends
        held += sum(
            parts[name].parameters * ask.compute_bytes
            for name, size in weights.items()
            if size and ask.trains.get(name)
        )
    use = _use(ask, ask.batch, prod(ask.size))
    step = _backward(parts["denoiser"], use, ask)
    if "text_encoder_1" in ask.trains:
        step += _clip_saved(parts["text_encoder_1"], ask.batch * ask.text_tokens, use)
    picture = 0.0
    if ask.samples_in_training and ask.sample_size is not None:
        picture = _picture(ask, ask.sample_size)
    return held + max(step, picture)


def _use(ask: MemoryQuestion, batch: int, pixels: int) -> _Use:
    heads = ask.model.components["denoiser"].config.get("attention_head_dim", 8)
    return _Use(
        batch, pixels // ask.model.latent_factor**2, ask.text_tokens, ask.compute_bytes,
        bool(ask.trains.get("denoiser")), ask.targets, "text_encoder_1" in ask.trains, ask.eager_attention,
        heads if isinstance(heads, int) else max(heads),
    )  # fmt: skip


# --- U-Net ------------------------------------------------------------------------------------------------------------


def _saved(layers: Sequence[Layer], use: _Use) -> Iterator[tuple[Layer, float]]:
    """(layer, numbers that autograd keeps for it). Before the first layer that trains nothing is kept."""
    active = False
    for layer in layers:
        trains = use.whole or f"denoiser.{layer.name}" in use.targets
        is_text = ".attn2.to_k" in layer.name or ".attn2.to_v" in layer.name
        active = active or trains or (is_text and use.text_grad)
        yield layer, _kept(layer, use, trains, is_text) if active else 0.0


def _kept(layer: Layer, use: _Use, trains: bool, is_text: bool) -> float:
    positions = use.batch * use.tokens if is_text else use.positions(layer)
    if "time_emb" in layer.name:
        positions = use.batch
    kept = float(use.targets.get(f"denoiser.{layer.name}", 0) * positions)  # between the adapter's two halves
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


def _backward(component: Component, use: _Use, ask: MemoryQuestion) -> float:
    """The highest point of a step: what is still kept and the gradients that are there already, walking back."""
    layers = unet_layers(component.config)
    kept = [(layer, numbers * use.number) for layer, numbers in _saved(layers, use)]
    widest = max(layer.outputs * use.positions(layer) for layer in layers) * use.number * LIVE_BACKWARD
    if ask.checkpointing:
        kept = list(_checkpointed(kept, use))
    left = sum(size for _, size in kept)
    working = HEAP * left if ask.device == "cpu" else widest
    gradients = 0.0 if ask.whole else ask.trainable * 4.0
    top = left + gradients
    for layer, size in reversed(kept):
        left -= size
        if ask.whole:
            gradients += 4 * sum(prod(shape) for _, shape in layer.parameters())
        top = max(top, left + gradients)
    return top + working


def _checkpointed(kept: list[tuple[Layer, float]], use: _Use) -> Iterator[tuple[Layer, float]]:
    """With gradient checkpointing only the input of each residual and transformer block stays; one block is run again."""
    blocks: dict[str, list[tuple[Layer, float]]] = {}
    for layer, size in kept:
        parts = layer.name.split(".")
        at = next((i for i, part in enumerate(parts) if part in ("resnets", "transformer_blocks")), None)
        blocks.setdefault(".".join(parts[: at + 2]) if at is not None else layer.name, []).append((layer, size))
    largest = max(sum(size for _, size in block) for block in blocks.values())
    for name, block in blocks.items():
        first = block[0][0]
        inside = "resnets" in name or "transformer_blocks" in name
        yield first, first.inputs * use.positions(first) * use.number if inside else block[0][1]
    yield kept[-1][0], largest


def _forward(component: Component, use: _Use) -> float:
    """A denoising step without gradients: the skips, and the tensors around the widest layer."""
    layers = unet_layers(component.config)
    widest = max(layer.outputs * use.positions(layer) for layer in layers)
    skips = sum(
        layer.outputs * use.positions(layer)
        for layer in layers
        if layer.name.startswith("down_blocks") and layer.name.endswith((".conv2", "downsamplers.0.conv"))
    )
    return (LIVE_UNET * widest + skips) * use.number


# --- autoencoder and text encoder -------------------------------------------------------------------------------------


def _vae_working(component: Component, pixels: int, batch: int, half: str, number: int) -> float:
    """Encoding or decoding `batch` pictures of `pixels`."""
    layers = [layer for layer in vae_layers(component.config) if layer.name.startswith(half)]
    widest = max(max(layer.inputs, layer.outputs) * pixels / 4**layer.level for layer in layers)
    return LIVE_VAE * widest * batch * number


def _picture(ask: MemoryQuestion, size: tuple[int, int]) -> float:
    """Making one picture beside the denoiser: the larger of denoising and decoding."""
    parts, pixels = ask.model.components, prod(size)
    decoding = parts["vae"].parameters * ask.frozen_bytes + _vae_working(
        parts["vae"], pixels, 1, "decoder", ask.frozen_bytes
    )
    return max(_forward(parts["denoiser"], _use(ask, GUIDED, pixels)), decoding)


def _text_working(component: Component, ask: MemoryQuestion) -> float:
    """Encoding a padded batch of captions: the tensors around one layer."""
    widest = max(layer.outputs for layer in clip_layers(component.config) if layer.kind == "linear")
    return 4.0 * ask.text_batch * ask.text_tokens * widest * ask.frozen_bytes


def _clip_saved(component: Component, positions: int, use: _Use) -> float:
    """What the backward pass through the text encoder keeps: norms, attention, and the activation between fc1 and fc2."""
    kept = 0
    for layer in clip_layers(component.config):
        if layer.kind == "norm":
            kept += 2 * layer.inputs
        elif layer.kind == "linear":
            kept += layer.outputs * (3 if layer.name.endswith("fc1") else 1)
    return float(kept * positions * use.number)
