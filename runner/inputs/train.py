"""What training is given; torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from runner.dataset.encodings import ItemSettings, TrainItem
from runner.dataset.order import Cycle, Group
from runner.facts import Fact, Tree, said, section, values
from runner.identity import fingerprint
from runner.inputs.cache import LatentEncoder, TextEncoder
from runner.model.numerics import Numerics
from runner.model.targets import Target
from schemas.training import Components, Ema, Loss, Optimizer, Scheduler, Timesteps

TRAIN_VERSION = 1


def settings_of(items: Iterable[TrainItem]) -> list[ItemSettings]:
    """What the items of each folder share."""
    return list({id(item.settings): item.settings for item in items}.values())


@dataclass(frozen=True, kw_only=True)
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


@dataclass(frozen=True, kw_only=True)
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
