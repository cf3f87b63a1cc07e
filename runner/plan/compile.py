"""Compiles a prepared run into its graph: cache → train → sample → select → publish. Pure and torch-free."""

from __future__ import annotations

import hashlib
import heapq
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from runner.dataset.encodings import TrainItem
from runner.inputs import (
    CACHE_VERSION,
    JUDGE_VERSION,
    PUBLISH_VERSION,
    SAMPLE_VERSION,
    TRAIN_VERSION,
    AdapterSettings,
    LatentEncoder,
    LatentsInputs,
    Numerics,
    PublishInputs,
    Runtime,
    SampleInputs,
    SelectInputs,
    TextEncoder,
    TextsInputs,
    TrainInputs,
)
from runner.plan.fingerprint import fingerprint, identity
from runner.plan.prepare import Prepared
from runner.plan.resolve import checkpoint_steps
from runner.seeding import lot
from schemas import RunConfig

STAGES = ("cache.latents", "cache.text", "train", "sample", "select", "publish")
EVALUATED_TRAINING_ITEMS = (8, 32)
"""As many training items as held-out ones are measured beside them, within these bounds; the upper one where none is."""
SMALL_MODEL = 20_000_000
"""A denoiser of fewer parameters runs on one CPU thread: its operations are too short to be shared."""
_NOISE_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "shift")


class Inputs(Protocol):
    """What every stage's inputs can tell."""

    def facts(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Node:
    """One stage of the graph."""

    name: str
    version: int
    inputs: Inputs
    upstream: tuple[str, ...]
    fingerprint: str


@dataclass(frozen=True)
class Graph:
    """The stages of a run in order, and what they share at run time."""

    nodes: dict[str, Node]
    runtime: Runtime
    latents: LatentsInputs
    texts: TextsInputs
    train: TrainInputs
    sample: SampleInputs
    select: SelectInputs
    publish: PublishInputs

    def fingerprint(self, name: str) -> str:
        return self.nodes[name].fingerprint


def compile_graph(prepared: Prepared, pinned: dict[str, Any] | None = None, kept: list[int] | None = None) -> Graph:
    """`pinned` is a choice by hand; `kept` the checkpoints that a finished training has, where they are not the planned ones."""
    config, weights, collection = prepared.config, prepared.weights, prepared.collection
    training, caching, seed = config.training, config.caching, config.run.seed
    assert config.model.dtype is not None
    assert caching.dtype is not None
    assert training.mixed_precision is not None
    prediction_type = prepared.spec.defaults.prediction_type or config.model.prediction_type
    assert prediction_type is not None
    numerics = Numerics(
        config.model.family, config.model.dtype, _vae_dtype(prepared), training.mixed_precision, prediction_type,
        bool(training.loss.zero_terminal_snr), {key: prepared.model.scheduler.get(key) for key in _NOISE_KEYS},
        config.model.max_token_length or prepared.spec.defaults.max_token_length, config.model.clip_skip or prepared.spec.defaults.clip_skip,
        prepared.model.text_width, config.model.quantization, config.model.text_encoder_quantization,
        _guidance(prepared), " ".join([prepared.model.variant, *([str(prepared.model.window)] if prepared.model.window else [])]) or None,
        prepared.spec.version if prepared.spec.version > 1 else None,
    )  # fmt: skip
    pictures = [weights[name] for name in ("vae", "image_encoder") if name in prepared.model.components]
    latent_encoder = LatentEncoder(
        pictures[0] if len(pictures) == 1 else identity("pictures", *pictures),
        numerics.vae_dtype,
        caching.latent_draw,
        seed,
        caching.dtype,
        caching.vae_tile_size,
    )
    encoders = {name: weights[name] for name in prepared.model.text_encoders}
    text_encoder = TextEncoder(
        identity("encoders", *(f"{name}={digest}" for name, digest in encoders.items()), *_base_weights(prepared)),
        weights["tokenizer"],
        numerics.dtype, numerics.clip_skip, numerics.max_token_length, caching.dtype, numerics.text_encoder_quantization,
    )  # fmt: skip
    train = _train_inputs(prepared, numerics, latent_encoder, text_encoder)
    trajectory = train.trajectory()
    compared = _compared(collection.items, len(collection.held_out), seed)
    items = _digest_of([train.items_digest, *(item.facts() for item in (*collection.held_out, *compared))])
    latents, texts = LatentsInputs(latent_encoder, items), TextsInputs(text_encoder, items)
    base = identity(
        "base",
        *(f"{name}={digest}" for name, digest in sorted(weights.items())),
        str(config.model.from_scratch),
        *train.base_weights,
    )
    assert training.checkpoints.every_n_steps is not None
    steps = tuple(kept) if kept is not None else _kept_steps(prepared)
    has_ema = training.ema is not None
    sample = SampleInputs(
        trajectory, base, steps, has_ema, tuple(prepared.prompts), numerics,
        {name: weights[name] for name in ("vae", *encoders, "tokenizer", *(["image_encoder"] if "image_encoder" in weights else []))}, config.sampling.prompt_weighting,
        config.sampling.vae_tile_size or caching.vae_tile_size,
    )  # fmt: skip
    selection = config.selection
    similar = "" if selection.veto.max_similarity is None else fingerprint(sample.facts())
    select = SelectInputs(
        trajectory, base, steps, has_ema, seed, selection.strategy, tuple(selection.metrics), selection.step, pinned,
        selection.veto, tuple(collection.held_out), tuple(compared), numerics,
        (latent_encoder.identity, text_encoder.identity), similar,
    )  # fmt: skip

    nodes: dict[str, Node] = {}

    def add(name: str, version: int, inputs: Inputs, upstream: tuple[str, ...], follows: tuple[str, ...]) -> None:
        facts = {
            "kind": name,
            "version": version,
            "facts": inputs.facts(),
            "upstream": [nodes[n].fingerprint for n in follows],
        }
        nodes[name] = Node(name, version, inputs, upstream, fingerprint(facts))

    # Training names its items and encoders itself, so the fingerprints of the caches are not part of its own: a caption
    # that only evaluation uses, or another padded batch, makes no other trajectory.
    add("cache.latents", CACHE_VERSION, latents, (), ())
    add("cache.text", CACHE_VERSION, texts, (), ())
    add("train", TRAIN_VERSION, train, ("cache.latents", "cache.text"), ())
    add("sample", SAMPLE_VERSION, sample, ("train",), ())
    add("select", JUDGE_VERSION, select, ("train", "sample"), ())
    publish = PublishInputs(
        nodes["select"].fingerprint, tuple(selection.publish), training.checkpoints.dtype, config.run.name
    )
    add("publish", PUBLISH_VERSION, publish, ("select",), ())
    return Graph(nodes, _runtime(prepared), latents, texts, train, sample, select, publish)


def _train_inputs(
    prepared: Prepared, numerics: Numerics, latent_encoder: LatentEncoder, text_encoder: TextEncoder
) -> TrainInputs:
    config, training = prepared.config, prepared.config.training
    network = config.network
    used = ["denoiser", *(name for name in prepared.model.text_encoders if getattr(training.components, name))]
    return TrainInputs(
        numerics=numerics,
        seed=config.run.seed,
        steps=prepared.length.steps,
        weights={name: prepared.weights[name] for name in used},
        from_scratch=config.model.from_scratch,
        latent_encoder=latent_encoder.identity,
        text_encoder=text_encoder.identity,
        components=training.components,
        targets=tuple(prepared.targets) if network is not None else None,
        adapter=AdapterSettings(
            network.dropout,
            network.rank_dropout,
            network.module_dropout,
            network.decompose_factor,
            network.lora_plus_ratio,
            network.scale_weight_norms,
        )
        if network is not None
        else None,
        base_weights=_base_weights(prepared),
        init_from=prepared.weights.get("init_from"),
        learning_rate=training.learning_rate,
        accumulation=training.gradient_accumulation_steps,
        max_grad_norm=training.max_grad_norm,
        clip_grad=training.clip_grad,
        optimizer=training.optimizer,
        scheduler=training.scheduler,
        loss=training.loss,
        timesteps=training.timesteps,
        ema=training.ema,
        items=tuple(prepared.collection.items),
        groups=tuple(prepared.collection.groups),
        cycle=prepared.collection.cycle,
        latents_cached=config.caching.latents != "off",
        texts_cached=config.caching.text != "off",
    )


def _base_weights(prepared: Prepared) -> tuple[str, ...]:
    """The adapters that are merged first: digest and multiplier of each."""
    pairs = zip(prepared.base_digests, prepared.base_weights, strict=True)
    return tuple(f"{digest} x {multiplier:g}" for digest, (_, multiplier) in pairs)


def _guidance(prepared: Prepared) -> float | None:
    """The guidance that the denoiser is told in training, in its own unit: thousandths of a scale of 1."""
    if prepared.spec.defaults.embedded_guidance is None:
        return None
    training = prepared.config.training
    return training.embedded_guidance * (1.0 if training.raw_embedded_guidance else 1000.0)


def _sample_swap(config: RunConfig) -> int:
    """blocks_to_swap of `runner sample`."""
    own = config.sampling.blocks_to_swap
    return config.training.memory.blocks_to_swap if own is None else own


def _vae_dtype(prepared: Prepared) -> str:
    """The autoencoder's precision: fp32 in place of fp16 where its activations overflow fp16, as in diffusers."""
    dtype = prepared.config.model.dtype
    assert dtype is not None
    overflows = bool(prepared.model.components["vae"].config.get("force_upcast"))
    return "fp32" if dtype == "fp16" and overflows else dtype


def _compared(items: list[TrainItem], held_out: int, seed: int) -> list[TrainItem]:
    """Some training items, chosen by a hash like the held-out ones."""
    own = [item for item in items if not item.settings.regularization]
    least, most = EVALUATED_TRAINING_ITEMS
    count = min(max(held_out, least), most) if held_out else most
    chosen = heapq.nsmallest(count, own, key=lambda item: lot(seed, item.digest))
    return sorted(chosen, key=lambda item: (item.digest, item.text))


def _kept_steps(prepared: Prepared) -> tuple[int, ...]:
    """The checkpoints that the run will have; which of the older ones is the best is known only then."""
    checkpoints = prepared.config.training.checkpoints
    assert checkpoints.every_n_steps is not None
    steps = checkpoint_steps(prepared.length.steps, checkpoints.every_n_steps)
    return tuple(steps if checkpoints.keep is None else steps[-checkpoints.keep :])


def _digest_of(parts: list[str]) -> str:
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part.encode("utf-8", "surrogatepass") + b"\n")
    return hasher.hexdigest()


def _runtime(prepared: Prepared) -> Runtime:
    config = prepared.config
    training, checkpoints, caching = config.training, config.training.checkpoints, config.caching
    assert checkpoints.every_n_steps is not None
    assert checkpoints.state_every_n_steps is not None
    assert caching.latents is not None
    assert caching.text is not None
    swap = partial(prepared.spec.swap_rule, prepared.model)
    return Runtime(
        model=prepared.model,
        base_folder=prepared.folder,
        output_dir=prepared.output_dir,
        name=config.run.name,
        device=config.run.device,
        deterministic=config.run.deterministic,
        attention=config.model.attention,
        split_attention=config.model.split_attention,
        compile=training.compile,
        gradient_checkpointing=training.memory.gradient_checkpointing,
        fused_backward=training.memory.fused_backward,
        optimizer_offload=training.memory.optimizer_offload,
        blocks_to_swap=swap(True).blocks(training.memory.blocks_to_swap),
        sample_swap=swap(False).blocks(_sample_swap(config)),
        activation_offload=training.memory.activation_offload,
        latents=caching.latents,
        texts=caching.text,
        latent_batch_size=caching.latent_batch_size,
        text_batch_size=caching.text_batch_size,
        vae_chunk_size=caching.vae_chunk_size,
        sample_tile=config.sampling.vae_tile_size or caching.vae_tile_size,
        sample_chunk=config.sampling.vae_chunk_size or caching.vae_chunk_size,
        workers=config.dataset.workers,
        checkpoint_every=checkpoints.every_n_steps,
        keep=checkpoints.keep,
        state_every=checkpoints.state_every_n_steps,
        log_every=training.logging.every_n_steps,
        tensorboard=training.logging.tensorboard,
        sample_every=config.sampling.every_n_steps,
        sample_at_first=config.sampling.at_first,
        steps_per_epoch=prepared.length.steps_per_epoch,
        init_from=prepared.init_from,
        base_weights=tuple(prepared.base_weights),
        layers=tuple(prepared.spec.layers(prepared.model)) if prepared.base_weights else (),
        threads=1 if prepared.model.components["denoiser"].parameters < SMALL_MODEL else None,
    )
