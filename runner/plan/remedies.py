"""What saves memory, as `--fit` may propose it: settings, what they change in the question that the family's memory model
is asked, and how much longer a step takes with them; torch-free.

What a family knows (its blocks, its autoencoder's tiles and strips, the keys that it refuses) comes from its spec. The
factors are those that users of these techniques report; docs/performance.md has those that were measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from runner.config.optimizer_kinds import state_bytes
from runner.families.spec import MemoryQuestion
from runner.inputs.train import TrainInputs
from runner.plan.diff import Plan

Change = Callable[[MemoryQuestion], MemoryQuestion]
CACHING = ("latents", "tiles", "strips", "captions", "text")
"""Groups that only the phases of caching depend on, where captions and pictures are cached."""
LARGE_ENCODERS = 10**9
"""Parameters of text encoders below which packing them is worth nothing."""


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """A change of settings that saves memory. Of several with one `group` at most one is taken; later ones save
    more."""

    group: str
    settings: Mapping[str, Any]
    slower: float
    why: str
    change: Change


def _with(**values: Any) -> Change:
    return lambda asked: replace(asked, **values)


def remedies(plan: Plan, question: MemoryQuestion) -> list[list[Remedy]]:
    """What could be changed of what is not set already, group by group; each on its own may still be refused."""
    refused = plan.prepared.spec.refused_keys
    groups: dict[str, list[Remedy]] = {}
    for remedy in (*_training(plan, question), *_caching(plan, question)):
        if not any(key in refused for key in remedy.settings):
            groups.setdefault(remedy.group, []).append(remedy)
    return list(groups.values())


def _training(plan: Plan, question: MemoryQuestion) -> Iterator[Remedy]:
    config = plan.prepared.config
    yield from _whole(plan, question) if question.whole else _adapters(plan, question)
    yield from _batches(plan, question)
    yield from _activations(question)
    if question.optimizer_bytes > state_bytes("adamw8bit") and config.training.optimizer.type == "adamw":
        yield Remedy(
            group="optimizer",
            settings={"training.optimizer.type": "adamw8bit"},
            slower=1.001,
            why="the optimizer's states take 8 bits",
            change=_with(optimizer_bytes=state_bytes("adamw8bit")),
        )
    if question.eager_attention:
        yield Remedy(
            group="attention",
            settings={"model.attention": "sdpa"},
            slower=1.0,
            why="attention's matrix is not kept",
            change=_with(eager_attention=False),
        )
    if question.sample_size is not None:
        for tile in _tiles(plan, question.sample_tile, question.sample_size):
            yield Remedy(
                group="sample tiles",
                settings={"sampling.vae_tile_size": tile},
                slower=1.0002,
                why=f"samples are decoded in tiles of {tile} (they change slightly)",
                change=_with(sample_tile=tile),
            )
        if question.sample_chunk is None:
            yield Remedy(
                group="sample strips",
                settings={"sampling.vae_chunk_size": 32},
                slower=1.0003,
                why="samples are decoded in strips of 32",
                change=_with(sample_chunk=32),
            )


def _activations(question: MemoryQuestion) -> Iterator[Remedy]:
    """Checkpointing, and what it keeps on the host; moving everything that is not recomputed would take too long."""
    checkpointing = {"training.memory.gradient_checkpointing": True}
    offload = {"training.memory.activation_offload": True}
    again = "activations are computed again in the backward pass"
    if not question.checkpointing:
        yield Remedy(
            group="activations", settings=checkpointing, slower=1.33, why=again, change=_with(checkpointing=True)
        )
    if question.activation_offload:
        return
    if question.checkpointing:
        yield Remedy(
            group="activations",
            settings=offload,
            slower=1.1,
            why="what stays of the activations waits on the host",
            change=_with(activation_offload=True),
        )
    else:
        yield Remedy(
            group="activations",
            settings={**checkpointing, **offload},
            slower=1.46,
            why=f"{again}; what stays of them waits on the host",
            change=_with(checkpointing=True, activation_offload=True),
        )


def _adapters(plan: Plan, question: MemoryQuestion) -> Iterator[Remedy]:
    spec, model = plan.prepared.spec, plan.prepared.model
    rule = spec.swap_rule(model, True)
    blocks, largest = spec.count_blocks(model)
    for share in (0.25, 0.5, 0.75, 1.0):
        count = int(rule.most * share)
        waiting = rule.blocks(count)
        if waiting > question.blocks_to_swap:
            yield Remedy(
                group="swap",
                settings={"training.memory.blocks_to_swap": count},
                slower=1 + 0.6 * share,
                why=f"{blocks - largest + waiting} of {blocks} blocks wait on the host",
                change=_with(blocks_to_swap=waiting),
            )
    now = _PACKED[question.quantization]
    for kind, (bits, slower) in _smaller(question.quantization).items():
        yield Remedy(
            group="quantization",
            settings={"model.quantization": kind},
            slower=slower / now[1],
            why=f"the denoiser's frozen weights take {bits} bits",
            change=_with(quantization=kind),
        )


_PACKED = {"none": (16, 1.0), "fp8": (8, 1.06), "fp8_scaled": (8, 1.06), "int8": (8, 1.06), "nf4": (4, 1.15)}
"""Quantization → bits of a weight, and how much longer a step takes."""


def _smaller(now: str) -> dict[str, tuple[int, float]]:
    """What packs weights into fewer bits than is done now."""
    return {kind: _PACKED[kind] for kind in ("fp8_scaled", "nf4") if _PACKED[kind][0] < _PACKED[now][0]}


def _whole(plan: Plan, question: MemoryQuestion) -> Iterator[Remedy]:
    training = plan.prepared.config.training
    if not question.optimizer_offload:
        yield Remedy(
            group="states",
            settings={"training.memory.optimizer_offload": True},
            slower=1.4,
            why="the optimizer's states wait on the host",
            change=_with(optimizer_offload=True),
        )
    if question.whole_bytes > 2:
        yield Remedy(
            group="rounding",
            settings={"training.optimizer.stochastic_rounding": True},
            slower=1.02,
            why="the trained weights are held in bf16, rounded by chance",
            change=_with(whole_bytes=2),
        )
    if not question.fused_backward and training.gradient_accumulation_steps == 1:
        clip = {} if training.max_grad_norm == 0 else {"training.clip_grad": "per_tensor"}
        yield Remedy(
            group="fused",
            settings={"training.memory.fused_backward": True, **clip},
            slower=1.01,
            why="each gradient is used and freed as it comes",
            change=_with(fused_backward=True),
        )


def _batches(plan: Plan, question: MemoryQuestion) -> Iterator[Remedy]:
    """Smaller batches, of which as many items as before make a step."""
    config = plan.prepared.config
    size, accumulation = config.dataset.batch_size, config.training.gradient_accumulation_steps
    if any(group.batch_size != size for group in plan.graph.of(TrainInputs).groups):  # a dataset file's own
        return
    smaller = [count for count in (size // 2, size // 4, 1) if count >= 1 and size % count == 0 and count < size]
    for count in dict.fromkeys(smaller):
        yield Remedy(
            group="batch",
            settings={
                "dataset.batch_size": count,
                "training.gradient_accumulation_steps": accumulation * size // count,
            },
            slower=1 + 0.5 * (1 - count / size),
            why=f"{count} of a batch at a time; as many as before make a step",
            change=partial(_smaller_batch, count=count),
        )


def _smaller_batch(question: MemoryQuestion, count: int) -> MemoryQuestion:
    return replace(question, batch=min(question.batch, count))


def _caching(plan: Plan, question: MemoryQuestion) -> Iterator[Remedy]:
    if question.encodes_latents:
        if question.latent_batch > 1:
            yield Remedy(
                group="latents",
                settings={"caching.latent_batch_size": 1},
                slower=1.0005,
                why="one picture or clip is encoded at a time",
                change=_with(latent_batch=1),
            )
        if question.vae_chunk is None:
            yield Remedy(
                group="strips",
                settings={"caching.vae_chunk_size": 32},
                slower=1.0006,
                why="the autoencoder works in strips of 32",
                change=lambda asked: replace(asked, vae_chunk=32, sample_chunk=asked.sample_chunk or 32),
            )
        for tile in _tiles(plan, question.vae_tile, question.size):
            yield Remedy(
                group="tiles",
                settings={"caching.vae_tile_size": tile},
                slower=1.002,
                why=f"the autoencoder works in tiles of {tile} (its results change slightly)",
                change=partial(_tiled, tile=tile),
            )
    if question.encodes_text and question.text_batch > 1:
        yield Remedy(
            group="captions",
            settings={"caching.text_batch_size": 1},
            slower=1.0004,
            why="one caption is encoded at a time",
            change=_with(text_batch=1),
        )
    encoders = question.model.text_encoders
    large = sum(question.model.components[name].parameters for name in encoders) > LARGE_ENCODERS
    if large and not any(question.trains.get(name) for name in encoders):
        for kind, (bits, _) in _smaller(question.text_encoder_quantization).items():
            yield Remedy(
                group="text",
                settings={"model.text_encoder_quantization": kind},
                slower=1.001 if bits == 8 else 1.003,
                why=f"the text encoders are held in {bits} bits",
                change=_with(text_encoder_quantization=kind),
            )


def _tiled(question: MemoryQuestion, tile: int) -> MemoryQuestion:
    """Samples are decoded in the same tiles where they have none of their own."""
    sampled = tile if question.sample_tile in (None, question.vae_tile) else question.sample_tile
    return replace(question, vae_tile=tile, sample_tile=sampled)


def _tiles(plan: Plan, now: int | None, size: tuple[int, int]) -> list[int]:
    """The family's sides of tiles that are smaller than the picture and than what is set."""
    return [tile for tile in plan.prepared.spec.tiles if tile < min(now or max(size), max(size))]
