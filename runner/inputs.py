"""What each stage is given; torch-free.

`facts()` of Inputs is what decides a stage's result and makes its fingerprint. `bits` changes bytes but not the
mathematics: it is recorded in state and lock. Runtime is where things lie and how fast they go; it is never hashed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from runner.config.ready import ReadyPrompt
from runner.dataset.buckets import View
from runner.dataset.encodings import ItemSettings, TrainItem, items_digest
from runner.dataset.order import Cycle, Group
from runner.families.spec import Model, Target
from runner.plan.fingerprint import fingerprint, identity
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

    def facts(self) -> dict[str, Any]:
        """What decides results. Families that have no guidance or variant leave them out."""
        return {name: value for name, value in self.__dict__.items() if value is not None}


@dataclass(frozen=True)
class LatentEncoder:
    """Everything but the picture that decides a latent."""

    weights: str
    dtype: str
    draw: str
    seed: int
    """Matters only where draw is "sample"."""
    stored_dtype: str
    tile_size: int | None = None

    @cached_property
    def identity(self) -> str:
        seed = str(self.seed) if self.draw == "sample" else ""
        return identity(
            "latents", str(CACHE_VERSION), self.weights, self.dtype, self.draw, seed, self.stored_dtype,
            *([f"tiles {self.tile_size}"] if self.tile_size else []),
        )  # fmt: skip

    def key(self, digest: str, view: View, batch_size: int) -> str:
        """Key of one stored latent. The padded batch may change its last bits, so it is part of the key."""
        return identity(self.identity, digest, f"{view.facts} {batch_size}")


@dataclass(frozen=True)
class TextEncoder:
    """Everything but the caption that decides its encoding."""

    weights: str
    tokenizer: str
    dtype: str
    clip_skip: int
    max_token_length: int
    stored_dtype: str
    quantization: str = "none"

    @cached_property
    def identity(self) -> str:
        return identity(
            "text", str(CACHE_VERSION), self.weights, self.tokenizer, self.dtype, str(self.clip_skip),
            str(self.max_token_length), self.stored_dtype, *([self.quantization] if self.quantization != "none" else []),
        )  # fmt: skip

    def key(self, text: str, batch_size: int) -> str:
        return identity(self.identity, text, str(batch_size))


@dataclass(frozen=True)
class LatentsInputs:
    """cache.latents: the views of pictures to encode."""

    encoder: LatentEncoder
    items_digest: str

    def facts(self) -> dict[str, Any]:
        return {"encoder": self.encoder.identity, "items": self.items_digest}


@dataclass(frozen=True)
class TextsInputs:
    """cache.text: the captions to encode."""

    encoder: TextEncoder
    items_digest: str

    def facts(self) -> dict[str, Any]:
        return {"encoder": self.encoder.identity, "items": self.items_digest}


@dataclass(frozen=True)
class AdapterSettings:
    """The settings of [network] that are not in the targets."""

    dropout: float
    rank_dropout: float
    module_dropout: float
    decompose_factor: int
    lora_plus_ratio: float
    scale_weight_norms: float | None


@dataclass(frozen=True)
class TrainInputs:
    """train: everything that decides the trajectory."""

    numerics: Numerics
    seed: int
    steps: int
    weights: Mapping[str, str]
    """Component → digest of its weights: those that training uses directly."""
    from_scratch: bool
    latent_encoder: str
    text_encoder: str
    components: Components
    targets: tuple[Target, ...] | None
    adapter: AdapterSettings | None
    base_weights: tuple[str, ...]
    """Digests and multipliers of the adapters that are merged first."""
    init_from: str | None
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
    groups: tuple[Group, ...]
    cycle: Cycle | None
    latents_cached: bool
    texts_cached: bool

    @cached_property
    def items_digest(self) -> str:
        return items_digest(list(self.items))

    @cached_property
    def _item_settings(self) -> list[ItemSettings]:
        return list({id(item.settings): item.settings for item in self.items}.values())

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

    def facts(self) -> dict[str, Any]:
        facts = {name: value for name, value in self.__dict__.items() if name in _TRAIN_FACTS}
        varies = self.varies
        facts["numerics"] = self.numerics.facts()
        facts["adapter"] = None if self.adapter is None else dict(self.adapter.__dict__)
        facts["targets"] = None if self.targets is None else [target.facts() for target in self.targets]
        facts["items"] = self.items_digest
        if self.cycle is not None:
            facts["turns"] = self.cycle.turns
        facts["variants"] = [varies["latents"] and self.latents_cached, varies["texts"] and self.texts_cached]
        return facts

    def trajectory(self) -> str:
        """The fingerprint without the length, where the length does not bend the course."""
        facts = self.facts()
        if not self.has_horizon:
            facts["steps"] = None
        return fingerprint({"kind": "trajectory", "version": TRAIN_VERSION, "facts": facts})


_TRAIN_FACTS = frozenset(TrainInputs.__dataclass_fields__) - {
    "items", "groups", "cycle", "targets", "adapter", "latents_cached", "texts_cached"
}  # fmt: skip


@dataclass(frozen=True)
class SampleInputs:
    """sample: the pictures of the base model and of each kept checkpoint."""

    trajectory: str
    base: str
    """Identity of the untrained model; its pictures are shared by all runs on it."""
    steps: tuple[int, ...]
    ema: bool
    prompts: tuple[ReadyPrompt, ...]
    numerics: Numerics
    frozen: Mapping[str, str]
    """Digests of the autoencoder, the text encoders and the tokenizers."""
    prompt_weighting: bool
    tile_size: int | None

    def facts(self) -> dict[str, Any]:
        prompts = [prompt.facts() for prompt in self.prompts]
        return {**self.__dict__, "numerics": self.numerics.facts(), "prompts": prompts}

    def key(self, prompt: ReadyPrompt, step: int, weights: str) -> str:
        """Key of one picture. Step 0 is the base model."""
        which = ["base", self.base] if step == 0 else [self.trajectory, step, weights]
        settings = [self.numerics.facts(), self.frozen, self.prompt_weighting, self.tile_size]
        return fingerprint(["sample", SAMPLE_VERSION, which, prompt.facts(), settings])


@dataclass(frozen=True)
class SelectInputs:
    """select: what is measured and how it is judged."""

    trajectory: str
    base: str
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
    encoders: tuple[str, str]
    """Identities of what encodes the items: latents, text."""
    pictures: str
    """Fingerprint of the sample stage where the similarity veto looks at its pictures, else empty."""

    def facts(self) -> dict[str, Any]:
        facts = dict(self.__dict__)
        facts["numerics"] = self.numerics.facts()
        facts["held_out"] = items_digest(list(self.held_out))
        facts["compared"] = items_digest(list(self.compared))
        return facts

    def score_key(self, step: int, weights: str) -> str:
        """Key of one candidate's measurement. Step 0 is the base model."""
        which = ["base", self.base] if step == 0 else [self.trajectory, step, weights]
        items = [items_digest(list(self.held_out)), items_digest(list(self.compared))]
        settings = [self.numerics.facts(), list(self.encoders)]
        return fingerprint(["score", SELECT_VERSION, which, items, self.seed, settings])


@dataclass(frozen=True)
class PublishInputs:
    """publish: where the chosen weights go."""

    select: str
    targets: tuple[Publish, ...]
    dtype: str
    name: str

    def facts(self) -> dict[str, Any]:
        return {"select": self.select, "targets": list(self.targets), "dtype": self.dtype, "name": self.name}


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
