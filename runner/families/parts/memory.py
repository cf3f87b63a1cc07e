"""Predicted peak memory of a run: weights, gradients and optimizer states exactly, activations by counting.

A family says what its denoiser keeps for the backward pass; the rest is the same for all. The backward pass frees what
was kept while gradients grow, and the peak is found by walking back. Without gradients only the tensors around the widest
layer live at once. docs/performance.md says how far this is from measured peaks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from runner.families.parts.part import Part
from runner.families.spec import MemoryAnswer, MemoryQuestion
from runner.model.layers import Config, Layer
from runner.model.model import is_denoiser

BASE = 30_000_000
"""What any phase takes beside tensors: threads, allocator, buffers of files."""
TRAIN_BASE = 20_000_000
"""What training takes beside that: autograd, the loader's threads, the log."""
SCORED_TOGETHER = 8
"""Noise levels that stable loss measures in one batch (stages/score.py)."""
GUIDED = 2
"""Rows of a guided denoising step: with the prompt and without."""
LIVE_VAE = 5.0
"""Tensors of the autoencoder's widest layer that live at once; its convolutions keep reordered copies."""
LIVE_VAE_CHUNKED = 3.5
"""The same where convolutions over time are computed in strips; an estimate."""
PATCH_AREA = 4
"""Latent positions of one token of a transformer."""
LIVE_BACKWARD = 2.0
"""Tensors of the widest layer's output that the backward pass needs at a time."""
HEAP = 0.5
"""On the CPU: what the C library's heap takes beyond the kept tensors while gradients come and go between them, as a
share of those tensors. A GPU's caching allocator reuses its blocks instead."""
LOADED = 1.06
"""On the CPU: what a module of many small tensors takes of the heap against their bytes."""
QUANTIZED_BYTES = {"fp8": 1.0, "fp8_scaled": 1.0 + 4 / 64, "int8": 1.001, "nf4": 0.5 + 4 / 64}
"""Bytes of one weight with its share of the scales (networks/quantize.py)."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """How a denoiser is used: sizes in positions (batch included) and the bytes of a number."""

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
    width: int = 0
    """Numbers of one token inside a transformer."""

    def positions(self, layer: Layer) -> int:
        return self.batch * max(1, self.area // 4**layer.level)


def _widest_output(layers: list[Layer], use: Use) -> float:
    return float(max(layer.outputs * use.positions(layer) for layer in layers))


def _input(first: Layer, use: Use) -> float:
    return float(first.inputs * use.positions(first))


@dataclass(frozen=True, kw_only=True)
class DenoiserMemory:
    """What a family knows of its parts, and of its denoiser."""

    parts: tuple[Part, ...]
    saved: Callable[[list[Layer], Use], Iterator[tuple[Layer, float]]]
    """(layer, numbers that autograd keeps for it), in the order of the forward pass."""
    forward: Callable[[list[Layer], Use], float]
    """Bytes of a forward pass without gradients."""
    widest: Callable[[list[Layer], Use], float] = _widest_output
    """Numbers of the largest tensor."""
    entering: Callable[[Layer, Use], float] = _input
    """(a block's first layer) → numbers of what enters the block: all that gradient checkpointing keeps of it."""
    guided: bool = True
    """Whether samples are made with true guidance; else it is embedded, or there is none."""


def predict(denoiser: DenoiserMemory, ask: MemoryQuestion) -> MemoryAnswer:
    """Bytes of each phase above the libraries' own."""
    return _Prediction(denoiser, ask).answer()


class _Prediction:
    def __init__(self, denoiser: DenoiserMemory, ask: MemoryQuestion) -> None:
        self.denoiser, self.ask = denoiser, ask
        self.parts = ask.model.components
        self.encoders = ask.model.text_encoders
        self.described = {part.name: part for part in denoiser.parts}
        self.denoisers = ask.model.denoising

    def answer(self) -> MemoryAnswer:
        ask, parts = self.ask, self.parts
        area = prod(ask.size)
        phases: dict[str, float] = {}
        if ask.encodes_latents:
            working = self._vae_working(area, ask.latent_batch, "encoder", ask.clip_frames)
            phases["cache.latents"] = self._vae() + self._image_encoder() + working
        if ask.encodes_text:
            phases["cache.text"] = sum(self._frozen(name) for name in self.encoders) + self._text_working()
        weights = self._resident()
        phases["train"] = TRAIN_BASE + self._train(weights)
        if ask.device == "cpu" and ask.quantization != "none":  # weights are read wide before they are packed
            packed = 0.0
            for name in self.denoisers:
                wide = parts[name].parameters * ask.frozen_bytes * LOADED
                phases["train"] = max(phases["train"], packed + wide + self._frozen(name) / 4)
                packed += self._frozen(name)
        denoiser = sum(weights.values()) + (0 if ask.whole else ask.trainable * 4)
        if ask.sample_size is not None:
            phases["sample"] = denoiser + self._picture(ask.sample_size)
        if ask.whole and ask.device == "cpu":  # the trained modules, the checkpoint for them, and the exported copy
            everything = sum(part.parameters for part in parts.values())
            phases["publish"] = 2 * sum(weights.values()) + 2 * everything
        together = 1 if ask.model.makes_video else SCORED_TOGETHER
        phases["select"] = denoiser + self._forward(together, area, self._seen(ask.frames))
        return MemoryAnswer({name: BASE + int(size) for name, size in phases.items()})

    def _layers(self, name: str) -> list[Layer]:
        return _listed(self.described[name].module.layers, self.parts[name].config)

    # --- weights ------------------------------------------------------------------------------------------------------

    def _frozen(self, name: str) -> float:
        """Bytes of a component in the dtype of frozen weights."""
        ask, part = self.ask, self.parts[name]
        kind = ask.quantization if is_denoiser(name) else ask.text_encoder_quantization
        total: float = part.parameters * ask.frozen_bytes
        if kind != "none":
            packed = self._packable(name)
            total -= packed * (ask.frozen_bytes - QUANTIZED_BYTES[kind])
        return total

    def _packable(self, name: str) -> int:
        """Weights in the linear layers of a component's blocks."""
        packs = self.described[name].packs
        return sum(
            layer.inputs * layer.outputs for layer in self._layers(name) if layer.kind == "linear" and packs(layer.name)
        )

    def _vae(self) -> float:
        return self.parts["vae"].parameters * self.ask.vae_bytes

    def _resident(self) -> dict[str, float]:
        """Bytes of the modules that stay on the device while training."""
        ask = self.ask
        found: dict[str, float] = {}
        for name in (*self.denoisers, *(name for name in self.encoders if name in ask.trains)):
            whole = ask.trains.get(name)
            found[name] = self.parts[name].parameters * ask.whole_bytes if whole else self._frozen(name)
        if ask.blocks_to_swap:
            found |= self._kept({name: found[name] for name in self.denoisers})
        return {name: held * LOADED if ask.device == "cpu" else held for name, held in found.items()}

    def _kept(self, held: Mapping[str, float]) -> dict[str, float]:
        """What of the denoisers' bytes is not on the host: of their blocks, as many of the largest in a row as there is room
        for, and two on their way. They have room for the blocks of one of them less those that wait."""
        sizes: dict[tuple[str, str], float] = {}
        for name in self.denoisers:
            for layer in self._layers(name):
                block = self.described[name].block_of(layer.name)
                if block is not None:
                    size = sum(prod(shape) for _, shape in layer.parameters())
                    sizes[name, block] = sizes.get((name, block), 0.0) + size
        owners, rows = [name for name, _ in sizes], list(sizes.values())
        room = min(len(rows), max(owners.count(name) for name in held) - self.ask.blocks_to_swap + 2)
        start = max(range(len(rows) - room + 1), key=lambda first: sum(rows[first : first + room]))
        stays = range(start, start + room)
        gone = {
            name: sum(row for place, row in enumerate(rows) if owners[place] == name and place not in stays)
            for name in held
        }
        return {name: bytes_ - gone[name] * bytes_ / self.parts[name].parameters for name, bytes_ in held.items()}

    # --- training -----------------------------------------------------------------------------------------------------

    def _train(self, weights: Mapping[str, float]) -> float:
        ask, parts = self.ask, self.parts
        held: float = sum(weights.values()) + (0 if ask.whole else ask.trainable * 4)
        held += ask.trainable * (
            (0 if ask.optimizer_offload and ask.device == "cuda" else ask.optimizer_bytes) + (4 if ask.ema else 0)
        )
        if not ask.text_cached:
            held += sum(self._frozen(name) for name in self.encoders if name not in ask.trains)
        if not ask.latents_cached:
            held += self._vae()
        if (
            ask.compute_bytes < ask.whole_bytes
        ):  # autocast keeps a copy of each weight that is wider, until the step ends
            held += sum(parts[name].parameters * ask.compute_bytes for name in weights if ask.trains.get(name))
        # Denoisers share a batch; what is kept of it is most where one has all of it.
        uses = {name: self._use(name, ask.batch, prod(ask.size), self._seen(ask.frames)) for name in self.denoisers}
        step = max(self._backward(name, use) for name, use in uses.items())
        number = uses[self.denoisers[0]].number
        for name in self.encoders:
            if name in ask.trains:
                step += _text_saved(self._layers(name), ask.batch * ask.text_tokens, number)
        picture = 0.0
        if ask.samples_in_training and ask.sample_size is not None:
            step += self._waiting_vae()
            picture = self._picture(ask.sample_size)
        return held + max(step, picture)

    def _seen(self, frames: int) -> float:
        """Latent frames that the denoiser sees, its history among them."""
        return frames + self.ask.model.history

    def _image_encoder(self) -> float:
        part = self.parts.get("image_encoder")
        return 0.0 if part is None else float(part.parameters * self.ask.frozen_bytes)

    def _forward(self, batch: int, pixels: int, frames: float) -> float:
        """Bytes of a forward pass without gradients, of the denoiser that needs most."""
        uses = {name: self._use(name, batch, pixels, frames) for name in self.denoisers}
        return max(self.denoiser.forward(self._layers(name), use) for name, use in uses.items())

    def _use(self, denoiser: str, batch: int, pixels: int, frames: float) -> Use:
        """Pictures of so many pixels, or so many latent frames of a video."""
        ask = self.ask
        config = self.parts[denoiser].config
        heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
        width = heads * config.get("attention_head_dim", 0) if isinstance(heads, int) else 0
        tokens = ask.text_tokens + ask.model.image_tokens
        return Use(
            batch=batch,
            area=int(pixels * frames / ask.model.latent_factor**2),
            tokens=tokens,
            number=ask.compute_bytes,
            whole=bool(ask.trains.get(denoiser)),
            targets={
                name.removeprefix(f"{denoiser}."): rank
                for name, rank in ask.targets.items()
                if name.startswith(f"{denoiser}.")
            },
            text_grad=any(name in ask.trains for name in self.encoders),
            eager=ask.eager_attention,
            heads=heads if isinstance(heads, int) else max(heads),
            width=width,
        )

    def _backward(self, denoiser: str, use: Use) -> float:
        """The highest point of a step: what is still kept and the gradients that are there already, walking back."""
        ask, layers = self.ask, self._layers(denoiser)
        kept = [(layer, numbers * use.number) for layer, numbers in self.denoiser.saved(layers, use)]
        widest = self.denoiser.widest(layers, use) * use.number * LIVE_BACKWARD
        share = self._kept_share()
        pieces = (
            self._checkpointed(denoiser, kept, use)
            if ask.checkpointing
            else [(_weights(layer), size * share) for layer, size in kept]
        )
        if not ask.checkpointing and share == 0:  # what is on its way to the host
            pieces.append((0.0, max(size for _, size in kept)))
        left = sum(size for _, size in pieces)
        working = HEAP * left if ask.device == "cpu" else widest
        gradients = self._other_gradients(denoiser) if ask.whole else ask.trainable * 4.0
        top = left + gradients
        largest = max(_weights(layer) for layer in layers) * ask.whole_bytes
        for weights, size in reversed(pieces):
            left -= size
            if ask.whole:
                gradients += ask.whole_bytes * weights
            if ask.whole and ask.fused_backward:  # each is used and freed as it comes
                gradients = min(gradients, 2.0 * largest)
            top = max(top, left + gradients)
        return top + working

    def _other_gradients(self, denoiser: str) -> float:
        """Of the other denoisers that train whole, where gradients wait for the end of the step."""
        others = [name for name in self.denoisers if name != denoiser and self.ask.trains.get(name)]
        numbers = sum(_weights(layer) for name in others for layer in self._layers(name))
        return 0.0 if self.ask.fused_backward else self.ask.whole_bytes * numbers

    def _kept_share(self) -> float:
        """What of the kept activations stays on the device."""
        return 0.0 if self.ask.activation_offload and self.ask.device == "cuda" else 1.0

    def _checkpointed(self, denoiser: str, kept: list[tuple[Layer, float]], use: Use) -> list[tuple[float, float]]:
        """(weights, bytes kept) of each block: with gradient checkpointing only a block's input stays (nothing, where
        activations are moved to the host); one block is run again."""
        block_of = self.described[denoiser].block_of
        blocks: dict[str, list[tuple[Layer, float]]] = {}
        for layer, size in kept:
            blocks.setdefault(block_of(layer.name) or layer.name, []).append((layer, size))
        share = self._kept_share()
        pieces = []
        for block in blocks.values():
            first = block[0][0]
            inside = block_of(first.name) is not None
            size = self.denoiser.entering(first, use) * use.number * share if inside else block[0][1]
            pieces.append((sum(_weights(layer) for layer, _ in block), size))
        largest = max(sum(size for _, size in block) for block in blocks.values())
        return [*pieces, (0.0, largest)]

    # --- pictures and text --------------------------------------------------------------------------------------------

    def _vae_working(self, pixels: int, batch: int, half: str, frames: int = 1) -> float:
        """Encoding or decoding `batch` pictures of `pixels`, or clips of so many frames."""
        frames_at = self.described["vae"].module.frames
        whole = 3.0 * 4 * pixels * frames * batch if frames_at is not None else 0.0  # the clip itself, in fp32
        tile, chunk = (
            (self.ask.vae_tile, self.ask.vae_chunk)
            if half == "encoder"
            else (self.ask.sample_tile, self.ask.sample_chunk)
        )
        if tile:  # a tile of each picture of the batch
            pixels = min(pixels, tile**2)
        sizes = (
            max(layer.inputs, layer.outputs)
            * pixels
            / 4**layer.level
            * (frames_at(layer, frames) if frames_at is not None else frames)
            for layer in self._layers("vae")
            if layer.name.startswith(half)
        )
        number = 4 if self.ask.device == "cpu" else self.ask.vae_bytes  # a CPU's convolutions work in fp32
        live = LIVE_VAE_CHUNKED if chunk else LIVE_VAE
        return live * max(sizes) * batch * number + whole

    def _picture(self, size: tuple[int, int]) -> float:
        """Making one picture beside the denoiser: the larger of denoising and decoding."""
        pixels = prod(size)
        decoding = self._vae() + self._vae_working(pixels, 1, "decoder", self.ask.decoded_frames)
        together = GUIDED if self.denoiser.guided else 1
        denoising = self._forward(together, pixels, self._seen(self.ask.sample_frames))
        return max(denoising + self._waiting_vae(), decoding)

    def _waiting_vae(self) -> float:
        """Between pictures the autoencoder stays in the host's memory (stages/previews.py), which is a CPU's own."""
        return self._vae() if self.ask.device == "cpu" else 0.0

    def _text_working(self) -> float:
        """Encoding a padded batch of captions: the tensors around one layer."""
        widest = max(layer.outputs for name in self.encoders for layer in self._layers(name) if layer.kind == "linear")
        return 4.0 * self.ask.text_batch * self.ask.text_tokens * widest * self.ask.frozen_bytes


def _weights(layer: Layer) -> float:
    """Trainable numbers of a layer."""
    return 0.0 if layer.kind == "table" else float(sum(prod(shape) for _, shape in layer.parameters()))


_LISTED: dict[tuple[Callable[[Config], list[Layer]], str], list[Layer]] = {}


def _listed(layers: Callable[[Config], list[Layer]], config: Config) -> list[Layer]:
    """The layers of a configuration, listed once: `--fit` asks many times."""
    key = layers, json.dumps(config, sort_keys=True, default=str)
    if key not in _LISTED:
        _LISTED[key] = layers(config)
    return _LISTED[key]


def _text_saved(layers: list[Layer], positions: int, number: int) -> float:
    """What the backward pass through a text encoder keeps: norms, attention, and the activation inside the MLP."""
    kept = 0
    for layer in layers:
        if layer.kind == "norm":
            kept += 2 * layer.inputs
        elif layer.kind == "linear":
            kept += layer.outputs * (3 if layer.name.endswith(("fc1", "wi_0")) else 1)
    return float(kept * positions * number)
