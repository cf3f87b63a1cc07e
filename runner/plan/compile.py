"""Compiles a prepared run into its graph: the inputs of each stage, in their order. Pure and torch-free."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

from runner.dataset.encodings import TrainItem
from runner.dataset.item_facts import COLUMNS, column_facts
from runner.facts import Fact, KnownAfter, Tree, unknown, values
from runner.identity import fingerprint
from runner.inputs.cache import LatentEncoder, TextEncoder
from runner.inputs.runtime import Runtime
from runner.inputs.sample import BaseModel
from runner.inputs.train import TrainInputs
from runner.model.model import Model
from runner.model.numerics import Numerics
from runner.plan.prepare import Prepared
from runner.plan.resolve import checkpoint_steps
from runner.plan.stage import Inputs, Stage
from runner.plan.stages.registry import stages
from runner.seeding import lot
from schemas import RunConfig

EVALUATED_TRAINING_ITEMS = (8, 32)
"""As many training items as held-out ones are measured beside them, within these bounds; the upper one where none is."""
SMALL_MODEL = 20_000_000
"""A denoiser of fewer parameters runs on one CPU thread: its operations are too short to be shared."""
_NOISE_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "shift")

Given = TypeVar("Given", bound=Inputs)


@dataclass(frozen=True, kw_only=True)
class Node:
    """One stage of the graph."""

    stage: Stage[Any]
    inputs: Inputs
    facts: Tree
    fingerprint: str
    """Where something is not known yet, that."""
    known_after: str | None
    """The stage before which not all of its inputs are known."""

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def identity(self) -> str | KnownAfter:
        """The fingerprint in the facts of what follows."""
        return self.fingerprint if self.known_after is None else KnownAfter(self.known_after)


class _Nodes:
    """Nodes by name, and by the kind of their inputs."""

    nodes: dict[str, Node]

    def node(self, kind: type[Inputs]) -> Node:
        """The node with inputs of this kind."""
        return next(node for node in self.nodes.values() if isinstance(node.inputs, kind))

    def of(self, kind: type[Given]) -> Given:
        """The inputs of this kind."""
        return next(node.inputs for node in self.nodes.values() if isinstance(node.inputs, kind))


@dataclass(frozen=True)
class Graph(_Nodes):
    """The stages of a run in order, and what they share at run time."""

    nodes: dict[str, Node]
    runtime: Runtime
    prepared: Prepared
    """The run with what its stages have found out so far."""
    given: Prepared
    """As it was given: what its files hold."""

    def fingerprint(self, name: str) -> str:
        return self.nodes[name].fingerprint

    @property
    def is_known(self) -> bool:
        """Whether no stage waits for what another one finds out."""
        return all(node.known_after is None for node in self.nodes.values())


@dataclass(frozen=True)
class Run(_Nodes):
    """A prepared run while its graph is made, and what the inputs of several stages have in common."""

    prepared: Prepared
    pinned: Mapping[str, Any] | None
    """A choice by hand."""
    kept: tuple[int, ...] | None
    """The checkpoints that a finished training has, where they are not the planned ones."""
    nodes: dict[str, Node] = field(default_factory=dict)

    @property
    def config(self) -> RunConfig:
        return self.prepared.config

    @cached_property
    def numerics(self) -> Numerics:
        prepared, config = self.prepared, self.config
        assert config.model.dtype is not None
        assert config.training.mixed_precision is not None
        prediction_type = prepared.spec.defaults.prediction_type or config.model.prediction_type
        assert prediction_type is not None
        return Numerics(
            family=config.model.family,
            dtype=config.model.dtype,
            vae_dtype=_vae_dtype(prepared),
            mixed_precision=config.training.mixed_precision,
            prediction_type=prediction_type,
            zero_terminal_snr=bool(config.training.loss.zero_terminal_snr),
            noise_schedule={key: prepared.model.scheduler.get(key) for key in _NOISE_KEYS},
            max_token_length=config.model.max_token_length or prepared.spec.defaults.max_token_length,
            clip_skip=config.model.clip_skip or prepared.spec.defaults.clip_skip,
            text_width=prepared.model.text_width,
            quantization=config.model.quantization,
            text_encoder_quantization=config.model.text_encoder_quantization,
            guidance=_guidance(prepared),
            variant=" ".join([prepared.model.variant, *([str(prepared.model.window)] if prepared.model.window else [])])
            or None,
            version=prepared.spec.version if prepared.spec.version > 1 else None,
            denoisers={own.component: own.low for own in prepared.model.denoisers}
            if len(prepared.model.denoisers) > 1
            else None,
        )

    @cached_property
    def picture_weights(self) -> dict[str, Fact]:
        """Of what encodes and decodes pictures."""
        names = [name for name in ("vae", "image_encoder") if name in self.prepared.model.components]
        return {name: self.prepared.weights[name] for name in names}

    @cached_property
    def text_weights(self) -> dict[str, Fact]:
        """Of the text encoders and their tokenizers."""
        weights = self.prepared.weights
        return {name: weights[name] for name in weights if name.startswith(("text_encoder", "tokenizer"))}

    @cached_property
    def latent_encoder(self) -> LatentEncoder:
        caching = self.config.caching
        assert caching.dtype is not None
        return LatentEncoder(
            weights=self.picture_weights,
            dtype=self.numerics.vae_dtype,
            draw=caching.latent_draw,
            seed=self.config.run.seed,
            stored_dtype=caching.dtype,
            tile_size=caching.vae_tile_size,
        )

    @cached_property
    def text_encoder(self) -> TextEncoder:
        numerics, caching = self.numerics, self.config.caching
        assert caching.dtype is not None
        return TextEncoder(
            weights={**self.text_weights, **self.prepared.merged_first},
            dtype=numerics.dtype,
            clip_skip=numerics.clip_skip,
            max_token_length=numerics.max_token_length,
            stored_dtype=caching.dtype,
            quantization=numerics.text_encoder_quantization,
        )

    @cached_property
    def item_facts(self) -> Tree:
        """Of the items that train."""
        collection, late = self.prepared.collection, self.prepared.known_after
        return column_facts(collection.items, COLUMNS, late) if late else collection.facts

    @cached_property
    def compared(self) -> tuple[TrainItem, ...]:
        """Training items that are measured beside the held-out ones."""
        collection = self.prepared.collection
        return tuple(_compared(collection.items, len(collection.held_out), self.config.run.seed))

    @cached_property
    def base(self) -> BaseModel:
        return BaseModel(self.prepared.weights, self.config.model.from_scratch, self.prepared.merged_first)

    @property
    def trajectory(self) -> str | KnownAfter:
        """Of the training, in the facts of what follows."""
        node = self.node(TrainInputs)
        return self.of(TrainInputs).trajectory() if node.known_after is None else node.identity

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """The checkpoints that there are, or will be."""
        return self.kept if self.kept is not None else _kept_steps(self.prepared)

    @cached_property
    def runtime(self) -> Runtime:
        return _runtime(self.prepared)


def compile_graph(prepared: Prepared, pinned: dict[str, Any] | None = None, kept: list[int] | None = None) -> Graph:
    """`pinned` is a choice by hand; `kept` the checkpoints that a finished training has, where they are not the planned ones."""
    run = Run(prepared, pinned, None if kept is None else tuple(kept))
    runtime = run.runtime
    for stage in stages():
        inputs = stage.inputs(run)
        if inputs is None:
            continue
        facts = inputs.facts()
        late = unknown(facts)
        # What a stage takes from those before it stands in its facts; that it follows them changes nothing: a caption that
        # only evaluation uses, or another padded batch, makes no other trajectory.
        named = {"kind": stage.name, "version": stage.version, "facts": values(facts)} if late is None else None
        node = Node(
            stage=stage,
            inputs=inputs,
            facts=facts,
            fingerprint=f"known after {late}" if named is None else fingerprint(named),
            known_after=late,
        )
        run.nodes[stage.name] = node
        settled = stage.settled(run.prepared, inputs, node.fingerprint) if late is None else run.prepared
        if settled is not run.prepared:
            run = replace(run, prepared=settled)
    return Graph(run.nodes, runtime, run.prepared, prepared)


def _guidance(prepared: Prepared) -> float | None:
    """The guidance that the denoiser is told in training, in its own unit: thousandths of a scale of 1."""
    if prepared.spec.defaults.embedded_guidance is None:
        return None
    training = prepared.config.training
    return training.embedded_guidance * (1.0 if training.raw_embedded_guidance else 1000.0)


def _largest_denoiser(model: Model) -> int:
    return max(model.components[name].parameters for name in model.denoising)


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
        threads=1 if _largest_denoiser(prepared.model) < SMALL_MODEL else None,
    )
