"""What each stage is given; torch-free.

`facts()` of Inputs is what decides a stage's result, with the keys of run.toml that each fact comes from: its values make
the fingerprint. `bits` changes bytes but not the
mathematics: it is recorded in state and lock. Runtime is where things lie and how fast they go; it is never hashed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from runner.dataset.buckets import View
from runner.dataset.encodings import ItemSettings, TrainItem
from runner.dataset.item_facts import CAPTIONS, COLUMNS, PICTURES, Column, column_facts
from runner.dataset.order import Cycle, Group
from runner.facts import Fact, KnownAfter, Tree, content, said, section, values
from runner.families.prompts import ReadyPrompt
from runner.families.spec import Model, Target
from runner.plan.fingerprint import canonical, fingerprint, identity
from schemas.selection import Publish, Veto
from schemas.training import Components, Ema, Loss, Optimizer, Scheduler, Timesteps

CACHE_VERSION = 1
TRAIN_VERSION = 1
SAMPLE_VERSION = 1
SELECT_VERSION = 1
JUDGE_VERSION = 2
"""Of the rule alone: measurements stay."""
LEAST_FOR_ERROR = 12
"""Measured items below which their spread says too little: the lowest loss decides then, and no error is allowed for."""
PUBLISH_VERSION = 2


@dataclass(frozen=True)
class Numerics:
    """How the model computes; shared by all stages that run it."""

    family: str
    dtype: str
    vae_dtype: str
    mixed_precision: str
    prediction_type: str
    zero_terminal_snr: bool
    noise_schedule: Mapping[str, Any]
    max_token_length: int
    clip_skip: int
    text_width: int
    quantization: str
    text_encoder_quantization: str
    guidance: float | None = None
    """What a distilled denoiser is told as guidance in training."""
    variant: str | None = None
    """What the denoiser is used for, and its window."""
    version: int | None = None
    """The family's version, from its second one on."""

    def facts(self) -> Tree:
        """What decides results."""
        return {
            "family": said(self.family, "model.family"),
            "version": said(self.version),
            "dtype": said(self.dtype, "model.dtype"),
            "vae_dtype": said(self.vae_dtype, "model.dtype"),
            "mixed_precision": said(self.mixed_precision, "training.mixed_precision"),
            "prediction_type": said(self.prediction_type, "model.prediction_type"),
            "zero_terminal_snr": said(self.zero_terminal_snr, "training.loss.zero_terminal_snr"),
            "noise_schedule": content(self.noise_schedule, "model.checkpoint"),
            "max_token_length": said(self.max_token_length, "model.max_token_length"),
            "clip_skip": said(self.clip_skip, "model.clip_skip"),
            "text_width": content(self.text_width, "model.checkpoint"),
            "quantization": said(self.quantization, "model.quantization"),
            "text_encoder_quantization": said(self.text_encoder_quantization, "model.text_encoder_quantization"),
            "guidance": said(self.guidance, "training.embedded_guidance", "training.raw_embedded_guidance"),
            "variant": said(self.variant, "model.variant", "model.latent_window_size"),
        }

    @cached_property
    def values(self) -> dict[str, Any]:
        found: dict[str, Any] = values(self.facts())
        return found


@dataclass(frozen=True)
class LatentEncoder:
    """Everything but the picture that decides a latent."""

    weights: Mapping[str, Fact]
    """Component → digest of its weights."""
    dtype: str
    draw: str
    seed: int
    """Matters only where draw is "sample"."""
    stored_dtype: str
    tile_size: int | None = None

    def facts(self) -> Tree:
        return {
            "version": said(CACHE_VERSION),
            "weights": self.weights,
            "dtype": said(self.dtype, "model.dtype"),
            "draw": said(self.draw, "caching.latent_draw"),
            "seed": said(self.seed if self.draw == "sample" else None, "run.seed"),
            "stored_dtype": said(self.stored_dtype, "caching.dtype"),
            "tile_size": said(self.tile_size, "caching.vae_tile_size"),
        }

    @cached_property
    def identity(self) -> str:
        return identity("latents", canonical(values(self.facts())))

    def key(self, digest: str, view: View, batch_size: int) -> str:
        """Key of one stored latent. The padded batch may change its last bits, so it is part of the key."""
        return identity(self.identity, digest, f"{view.facts} {batch_size}")


@dataclass(frozen=True)
class TextEncoder:
    """Everything but the caption that decides its encoding."""

    weights: Tree
    """Digests of text encoders, tokenizers and the adapters that are merged first."""
    dtype: str
    clip_skip: int
    max_token_length: int
    stored_dtype: str
    quantization: str = "none"

    def facts(self) -> Tree:
        return {
            "version": said(CACHE_VERSION),
            "weights": self.weights,
            "dtype": said(self.dtype, "model.dtype"),
            "clip_skip": said(self.clip_skip, "model.clip_skip"),
            "max_token_length": said(self.max_token_length, "model.max_token_length"),
            "stored_dtype": said(self.stored_dtype, "caching.dtype"),
            "quantization": said(self.quantization, "model.text_encoder_quantization"),
        }

    @cached_property
    def identity(self) -> str:
        return identity("text", canonical(values(self.facts())))

    def key(self, text: str, batch_size: int) -> str:
        return identity(self.identity, text, str(batch_size))


@dataclass(frozen=True)
class CachedItems:
    """The items whose encodings are kept."""

    trained: Tree
    measured: Tree
    seed: int
    varies: bool
    """Two uses of an item may have different encodings: they are drawn from the seed."""
    place: str
    """"disk", "memory" or "off"."""
    batch_size: int

    def facts(self, columns: Mapping[str, Column], place: str, batch_size: str) -> Tree:
        """`place` and `batch_size` are the keys of the two."""
        return {
            "trained": {name: self.trained[name] for name in columns},
            "measured": {name: self.measured[name] for name in columns},
            "seed": said(self.seed if self.varies else None, "run.seed"),
            "place": Fact(self.place, (place,), hashed=False),
            "batch_size": Fact(self.batch_size, (batch_size,), hashed=False),
        }


@dataclass(frozen=True)
class LatentsInputs:
    """cache.latents: the views of pictures to encode."""

    encoder: LatentEncoder
    items: CachedItems

    def facts(self) -> Tree:
        items = self.items.facts(PICTURES, "caching.latents", "caching.latent_batch_size")
        return {"encoder": self.encoder.facts(), **items}


@dataclass(frozen=True)
class TextsInputs:
    """cache.text: the captions to encode."""

    encoder: TextEncoder
    items: CachedItems

    def facts(self) -> Tree:
        columns = CAPTIONS | ({"picture": PICTURES["picture"]} if self.items.varies else {})
        items = self.items.facts(columns, "caching.text", "caching.text_batch_size")
        return {"encoder": self.encoder.facts(), **items}


def settings_of(items: Iterable[TrainItem]) -> list[ItemSettings]:
    """What the items of each folder share."""
    return list({id(item.settings): item.settings for item in items}.values())


@dataclass(frozen=True)
class AdapterSettings:
    """The settings of [network] that are not in the targets."""

    dropout: float
    rank_dropout: float
    module_dropout: float
    decompose_factor: int
    lora_plus_ratio: float
    scale_weight_norms: float | None

    def facts(self) -> Tree:
        return {name: said(value, f"network.{name}") for name, value in self.__dict__.items()}


@dataclass(frozen=True)
class TrainInputs:
    """train: everything that decides the trajectory."""

    numerics: Numerics
    seed: int
    steps: int
    weights: Mapping[str, Fact]
    """Component → digest of its weights: those that training uses directly."""
    from_scratch: bool
    latent_encoder: LatentEncoder
    text_encoder: TextEncoder
    components: Components
    targets: tuple[Target, ...] | None
    adapter: AdapterSettings | None
    base_weights: Tree
    """Digests and multipliers of the adapters that are merged first."""
    init_from: Fact
    learning_rate: float
    accumulation: int
    max_grad_norm: float
    clip_grad: str
    optimizer: Optimizer
    scheduler: Scheduler
    loss: Loss
    timesteps: Timesteps
    ema: Ema | None
    items: tuple[TrainItem, ...]
    item_facts: Tree
    groups: tuple[Group, ...]
    cycle: Cycle | None
    latents_cached: bool
    texts_cached: bool

    @cached_property
    def _item_settings(self) -> list[ItemSettings]:
        return settings_of(self.items)

    @property
    def has_horizon(self) -> bool:
        """Whether the course of training depends on its length, so that it cannot be extended."""
        shares = [settings.captions.warmup_step for settings in self._item_settings]
        return (
            self.scheduler.type not in ("constant", "piecewise")
            or bool(self.scheduler.warmup_ratio)
            or any(0 < x < 1 for x in shares)
        )

    @property
    def varies(self) -> dict[str, bool]:
        """Which kinds of encoding differ from use to use; only then it matters whether they are cached variants."""
        return {
            "latents": any(settings.look.varies for settings in self._item_settings),
            "texts": any(settings.captions.varies for settings in self._item_settings),
        }

    @property
    def _mixes_scales(self) -> bool:
        """Whether layers that share their first factor have scales of their own."""
        scales: dict[str, set[float]] = {}
        for target in self.targets or ():
            if target.tied:
                scales.setdefault(target.kohya, set()).add(target.scale)
        return any(len(own) > 1 for own in scales.values())

    def facts(self) -> Tree:
        return self._facts

    @cached_property
    def _facts(self) -> Tree:
        varies = self.varies
        targets = None if self.targets is None else [target.facts() for target in self.targets]
        return {
            "numerics": self.numerics.facts(),
            "seed": said(self.seed, "run.seed"),
            "steps": said(self.steps, "training.max_train_steps", "training.max_train_epochs"),
            "weights": self.weights,
            "from_scratch": said(self.from_scratch, "model.from_scratch"),
            "latent_encoder": self.latent_encoder.facts(),
            "text_encoder": self.text_encoder.facts(),
            "components": section(self.components, "training.components"),
            "targets": said(targets, "network"),
            "adapter": said(None, "network") if self.adapter is None else self.adapter.facts(),
            "base_weights": self.base_weights,
            "init_from": self.init_from,
            "learning_rate": said(self.learning_rate, "training.learning_rate"),
            "accumulation": said(self.accumulation, "training.gradient_accumulation_steps"),
            "max_grad_norm": said(self.max_grad_norm, "training.max_grad_norm"),
            "clip_grad": said(self.clip_grad, "training.clip_grad"),
            "optimizer": section(self.optimizer, "training.optimizer"),
            "scheduler": section(self.scheduler, "training.scheduler"),
            "loss": section(self.loss, "training.loss"),
            "timesteps": section(self.timesteps, "training.timesteps"),
            "ema": section(self.ema, "training.ema"),
            "items": self.item_facts,
            "turns": said(None if self.cycle is None else self.cycle.turns, "dataset.**.regularization"),
            "variants": {
                "latents": said(varies["latents"] and self.latents_cached, "caching.latents"),
                "texts": said(varies["texts"] and self.texts_cached, "caching.text"),
            },
        }

    @cached_property
    def _trajectory(self) -> str:
        facts = values(self._facts)
        if not self.has_horizon:
            facts["steps"] = None
        return fingerprint({"kind": "trajectory", "version": TRAIN_VERSION, "facts": facts})

    def trajectory(self) -> str:
        """The fingerprint without the length, where the length does not bend the course."""
        return self._trajectory


@dataclass(frozen=True)
class BaseModel:
    """The untrained model; its pictures and losses are shared by all runs on it."""

    weights: Mapping[str, Fact]
    from_scratch: bool
    base_weights: Tree

    def facts(self) -> Tree:
        from_scratch = said(self.from_scratch, "model.from_scratch")
        return {"weights": self.weights, "from_scratch": from_scratch, "base_weights": self.base_weights}

    @cached_property
    def identity(self) -> str:
        return identity("base", canonical(values(self.facts())))


@dataclass(frozen=True)
class SampleInputs:
    """sample: the pictures of the base model and of each kept checkpoint."""

    trajectory: str | KnownAfter
    base: BaseModel
    steps: tuple[int, ...]
    ema: bool
    prompts: tuple[ReadyPrompt, ...]
    numerics: Numerics
    frozen: Mapping[str, Fact]
    """Digests of the autoencoder, the text encoders and the tokenizers."""
    prompt_weighting: bool
    tile_size: int | None

    def facts(self) -> Tree:
        return {
            "trajectory": said(self.trajectory),
            "base": self.base.facts(),
            "steps": said(self.steps),
            "ema": said(self.ema),
            "numerics": self.numerics.facts(),
            "prompts": {
                "count": said(len(self.prompts), *_PROMPTS),
                **{str(number): _prompt_facts(prompt) for number, prompt in enumerate(self.prompts)},
            },
            **self._settings,
        }

    @cached_property
    def _settings(self) -> Tree:
        return {
            "frozen": self.frozen,
            "prompt_weighting": said(self.prompt_weighting, "sampling.prompt_weighting"),
            "tile_size": said(self.tile_size, "sampling.vae_tile_size", "caching.vae_tile_size"),
        }

    def key(self, prompt: ReadyPrompt, step: int, weights: str) -> str:
        """Key of one picture. Step 0 is the base model."""
        which = ["base", self.base.identity] if step == 0 else [self.trajectory, step, weights]
        settings = [self.numerics.values, values(self._settings)]
        return fingerprint(["picture", SAMPLE_VERSION, which, prompt.facts(), settings])


_PROMPTS = ("sampling.prompts", "sampling.prompt_file")


def _prompt_facts(prompt: ReadyPrompt) -> Tree:
    """What decides a prompt's pictures. A value may stand in the prompt, in [sampling] or in the file of prompts."""
    own = prompt.own.keys if prompt.own is not None else {}
    keys = {"frames": ("frames", "seconds", "sections", "fps"), **own}
    beside = {name: tuple(f"sampling.**.{key}" for key in those) for name, those in keys.items()}
    beside["seed"] = ("sampling.**.seed", "run.seed")
    file = ("sampling.prompt_file", "sampling.dialect")
    return {
        name: said(value, *beside.get(name, (f"sampling.**.{name}",)), *file) for name, value in prompt.facts().items()
    }


@dataclass(frozen=True)
class SelectInputs:
    """select: what is measured and how it is judged."""

    trajectory: str | KnownAfter
    base: BaseModel
    steps: tuple[int, ...]
    ema: bool
    seed: int
    strategy: str
    metrics: tuple[str, ...]
    step: int | None
    pinned: Mapping[str, Any] | None
    """A choice by hand: {"step", "weights"}."""
    veto: Veto
    held_out: tuple[TrainItem, ...]
    compared: tuple[TrainItem, ...]
    """Training items measured beside the held-out ones, for the gap; the only ones where nothing is held out."""
    numerics: Numerics
    encoders: tuple[LatentEncoder, TextEncoder]
    """What encodes the items."""
    pictures: Tree
    """The facts of the sample stage where the similarity veto looks at its pictures, else empty."""
    known_after: Mapping[str, str]
    """What is not known of the items yet (`Prepared.known_after`)."""

    def facts(self) -> Tree:
        return {
            "trajectory": said(self.trajectory),
            "base": self.base.facts(),
            "steps": said(self.steps),
            "ema": said(self.ema),
            "strategy": said(self.strategy, "selection.strategy"),
            "metrics": said(self.metrics, "selection.metrics"),
            "step": said(self.step, "selection.step"),
            "pinned": said(self.pinned),
            "veto": section(self.veto, "selection.veto"),
            "numerics": self.numerics.facts(),
            "pictures": self.pictures,
            **self._measured,
        }

    @cached_property
    def _measured(self) -> Tree:
        """What decides a candidate's losses beside its weights."""
        return {
            "seed": said(self.seed, "run.seed"),
            "held_out": column_facts(self.held_out, COLUMNS, self.known_after),
            "compared": column_facts(self.compared, COLUMNS, self.known_after),
            "latent_encoder": self.encoders[0].facts(),
            "text_encoder": self.encoders[1].facts(),
        }

    @cached_property
    def _settings(self) -> str:
        return fingerprint([SELECT_VERSION, self.numerics.values, values(self._measured)])

    def score_key(self, step: int, weights: str) -> str:
        """Key of one candidate's measurement. Step 0 is the base model."""
        which = ["base", self.base.identity] if step == 0 else [self.trajectory, step, weights]
        return fingerprint(["score", which, self._settings])


@dataclass(frozen=True)
class PublishInputs:
    """publish: where the chosen weights go."""

    select: str | KnownAfter
    targets: tuple[Publish, ...]
    dtype: str
    name: str

    def facts(self) -> Tree:
        return {
            "choice": said(self.select),
            "targets": said(list(self.targets), "selection.publish"),
            "dtype": said(self.dtype, "training.checkpoints.dtype"),
            "name": said(self.name, "run.name"),
        }


@dataclass(frozen=True)
class Runtime:
    """Where things lie and how they are done; nothing here changes what a stage computes, `bits` aside."""

    model: Model
    base_folder: Path
    output_dir: Path
    name: str
    device: str
    deterministic: bool
    attention: str
    split_attention: bool
    compile: bool
    gradient_checkpointing: bool
    fused_backward: bool
    optimizer_offload: bool
    blocks_to_swap: int
    """Blocks that wait on the host while training."""
    sample_swap: int
    """The same for `runner sample`."""
    activation_offload: bool
    latents: str
    texts: str
    latent_batch_size: int
    text_batch_size: int
    vae_chunk_size: int | None
    sample_tile: int | None
    sample_chunk: int | None
    workers: int
    checkpoint_every: int
    keep: int | None
    state_every: int
    log_every: int
    tensorboard: bool
    sample_every: int | None
    sample_at_first: bool
    steps_per_epoch: int
    init_from: Path | None
    base_weights: tuple[tuple[Path, float], ...]
    layers: tuple[Target, ...]
    """Every layer that an adapter of a file may be for; filled where base_weights are given."""
    threads: int | None
    """CPU threads; None is PyTorch's own choice."""

    def bits(self) -> dict[str, Any]:
        """What may change the last bits of a result."""
        return {
            "run.deterministic": self.deterministic,
            "model.attention": self.attention,
            **({"model.split_attention": True} if self.split_attention else {}),
            **({"caching.vae_chunk_size": self.vae_chunk_size} if self.vae_chunk_size else {}),
            **({"sampling.vae_chunk_size": self.sample_chunk} if self.sample_chunk else {}),
            "training.compile": self.compile,
            "training.memory.gradient_checkpointing": self.gradient_checkpointing,
            "training.memory.fused_backward": self.fused_backward,
            "training.memory.optimizer_offload": self.optimizer_offload,
            "training.memory.blocks_to_swap": self.blocks_to_swap,
            "training.memory.activation_offload": self.activation_offload,
            "caching.latent_batch_size": self.latent_batch_size,
            "caching.text_batch_size": self.text_batch_size,
        }


def candidates(steps: tuple[int, ...], ema: bool, with_base: bool) -> list[tuple[int, str]]:
    """(step, weights) of everything that is compared; the base model is step 0 and comes first."""
    kinds = ("raw", "ema") if ema else ("raw",)
    return [(0, "raw")] * with_base + [(step, kind) for step in steps for kind in kinds]
