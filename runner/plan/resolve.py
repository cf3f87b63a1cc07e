"""Fills in what run.toml leaves open: from the family, the checkpoint, and other keys. The plan shows each derived value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from runner.families.spec import FamilySpec
from runner.files import resolve_path
from runner.model.model import Model
from schemas import RunConfig
from schemas.base import MOST_STEPS
from schemas.dataset import ItemOptions

MOST_CHECKPOINTS = 10_000
MOST_SAMPLES = 100_000


@dataclass(frozen=True)
class Derived:
    """A value that run.toml did not give."""

    key: str
    value: Any
    why: str


def replaced(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """The configuration with the keys at dotted paths set."""
    result: BaseModel = config
    for dotted, value in values.items():
        result = _set(result, dotted.split("."), value)
    assert isinstance(result, RunConfig)
    return result


def valued(config: RunConfig, dotted: str) -> Any:
    """The value of a key at a dotted path."""
    node: Any = config
    for name in dotted.split("."):
        node = getattr(node, name)
    return node


def _set(model: BaseModel, path: list[str], value: Any) -> BaseModel:
    if len(path) == 1:
        return model.model_copy(update={path[0]: value})
    return model.model_copy(update={path[0]: _set(getattr(model, path[0]), path[1:], value)})


def resolve(
    config: RunConfig, spec: FamilySpec, model: Model, folder: Path, options: Sequence[ItemOptions]
) -> tuple[RunConfig, list[Derived]]:
    """All keys that depend on the model and on other keys; the checkpoints' cadence needs `resolve_length` too.

    `options` are those of the sources' items.
    """
    derived: list[Derived] = []

    def derive(key: str, value: Any, why: str) -> None:
        derived.append(Derived(key, value, why))

    family = f"family {spec.name}"
    dtype = config.model.dtype or spec.defaults.dtype
    if config.run.output_dir is None:
        derive("run.output_dir", str(folder / "runs" / config.run.name), "beside run.toml")
    else:
        config = replaced(config, {"run.output_dir": str(resolve_path(config.run.output_dir, folder))})
    if config.model.dtype is None:
        derive("model.dtype", dtype, family)
    for key, value in (spec.derived(model) if spec.derived is not None else {}).items():
        if valued(config, key) is None:
            derive(key, value, model.stated[key].why if key in model.stated else family)
    if spec.defaults.prediction_type is None:
        for key, value, why in _noise(config, model):
            derive(key, value, why)
    if config.model.clip_skip is None and "model.clip_skip" not in spec.refused_keys:
        derive("model.clip_skip", spec.defaults.clip_skip, family)
    if config.model.max_token_length is None and "model.max_token_length" not in spec.refused_keys:
        derive("model.max_token_length", spec.defaults.max_token_length, family)
    timesteps = config.training.timesteps
    if timesteps.sampling is None:
        derive("training.timesteps.sampling", spec.defaults.timestep_sampling, family)
    if timesteps.shift is None:
        derive("training.timesteps.shift", spec.defaults.timestep_shift, family)
    precision: str | None = config.training.mixed_precision
    if precision is None:
        precision = "no" if dtype == "fp32" else dtype
        derive("training.mixed_precision", precision, "model.dtype")
    if config.caching.dtype is None:
        derive("caching.dtype", "fp32" if precision == "no" else precision, "training.mixed_precision")
    if config.dataset.resolution is None:
        own = spec.defaults.resolution
        derive("dataset.resolution", list(own) if own else model.native_size, family if own else "the model's own size")
    if config.dataset.buckets.step is None:
        derive("dataset.buckets.step", model.bucket_step, "the model's architecture")
    if config.network is not None and not config.network.rank_pattern:
        if config.network.alpha is None:
            derive("network.alpha", float(config.network.rank), "network.rank, a scale of 1")
        if config.network.conv_rank is not None and config.network.conv_alpha is None:
            derive("network.conv_alpha", float(config.network.conv_rank), "network.conv_rank, a scale of 1")
    derived += _caching(config, options)
    sampling = config.sampling
    values: tuple[tuple[str, Any, str], ...] = (
        ("width", spec.defaults.sample_size or model.native_size, "the model's own size"),
        ("height", spec.defaults.sample_size or model.native_size, "the model's own size"),
        ("num_inference_steps", spec.defaults.num_inference_steps, family),
        ("cfg_scale", spec.defaults.cfg_scale, family),
        ("sampler", spec.defaults.sampler, family),
        ("dialect", spec.defaults.dialect, family),
    )
    for name, value, why in values:
        if getattr(sampling, name) is None:
            derive(f"sampling.{name}", value, why)
    return replaced(config, {item.key: item.value for item in derived}), derived


def _noise(config: RunConfig, model: Model) -> Iterator[tuple[str, Any, str]]:
    """What the denoiser predicts, and whether the schedule ends in pure noise, from which epsilon cannot be learned."""
    key = "model.prediction_type"
    predicted, why = model.stated.get(key, ("epsilon", "the checkpoint says nothing else"))
    if config.model.prediction_type is None:
        yield key, predicted, why
    key = "training.loss.zero_terminal_snr"
    value, why = model.stated.get(key, (False, "the checkpoint does not say it"))
    if value and (config.model.prediction_type or predicted) == "epsilon":
        value, why = False, f"{why} says true, but from pure noise epsilon cannot be learned"
    if config.training.loss.zero_terminal_snr is None:
        yield key, value, why


def _caching(config: RunConfig, options: Sequence[ItemOptions]) -> list[Derived]:
    """Where encodings are kept: on disk, unless what is encoded changes from use to use."""
    derived = []

    def reason(names: Sequence[str], is_on: Callable[[str, Any], bool] = lambda _, value: bool(value)) -> str | None:
        return next((name for own in options for name in names if is_on(name, getattr(own, name))), None)

    if config.caching.latents is None:
        varying = reason(("random_crop", "color_aug", "face_crop_aug_range", "crop_style"), _varies)
        why = f"{varying}: every use is encoded" if varying else "default"
        derived.append(Derived("caching.latents", "off" if varying else "disk", why))
    if config.caching.text is None:
        varying = reason(("shuffle_caption", "enable_wildcard", "caption_tag_dropout_rate", "token_warmup_step"))
        if config.training.components.text_encoders:
            derived.append(Derived("caching.text", "off", "a text encoder trains"))
        elif varying is not None:
            derived.append(Derived("caching.text", "off", f"{varying}: captions vary between uses"))
        else:
            derived.append(Derived("caching.text", "disk", "default"))
    return derived


def _varies(name: str, value: Any) -> bool:
    """Whether a picture option makes two uses look different."""
    if name == "crop_style":
        return bool(value == "random")
    return bool(value is not None and value[0] != value[1]) if name == "face_crop_aug_range" else bool(value)


@dataclass(frozen=True)
class Length:
    """How long training is, exactly."""

    steps: int
    steps_per_epoch: int
    batches_per_epoch: int

    @property
    def epochs(self) -> float:
        return self.steps / self.steps_per_epoch if self.steps_per_epoch else 0.0


def resolve_length(config: RunConfig, batches_per_epoch: int) -> tuple[RunConfig, Length, list[Derived]]:
    """Steps, and the cadences that follow from them."""
    per_epoch = math.ceil(batches_per_epoch / config.training.gradient_accumulation_steps)
    derived: list[Derived] = []
    steps = config.training.max_train_steps
    if steps is None:
        assert config.training.max_train_epochs is not None
        steps = per_epoch * config.training.max_train_epochs
        derived.append(
            Derived(
                "training.max_train_steps", steps, f"{config.training.max_train_epochs} epochs of {per_epoch} steps"
            )
        )
    checkpoints = config.training.checkpoints
    every = checkpoints.every_n_steps
    if every is None:
        if checkpoints.every_n_epochs is not None:
            every, why = checkpoints.every_n_epochs * per_epoch, "training.checkpoints.every_n_epochs"
        else:
            every, why = max(1, math.ceil(steps / 10)), "ten over the run"
        derived.append(Derived("training.checkpoints.every_n_steps", every, why))
    if checkpoints.state_every_n_steps is None:
        derived.append(Derived("training.checkpoints.state_every_n_steps", every, "with each checkpoint"))
    if config.sampling.every_n_steps is None and config.sampling.every_n_epochs is not None:
        derived.append(
            Derived("sampling.every_n_steps", config.sampling.every_n_epochs * per_epoch, "sampling.every_n_epochs")
        )
    resolved = replaced(config, {item.key: item.value for item in derived})
    return resolved, Length(steps, per_epoch, batches_per_epoch), derived


def too_much(config: RunConfig, length: Length, prompts: int) -> tuple[tuple[str, ...], str, str] | None:
    """(key, what, hint) of a run that nobody could carry out; None where all is well."""
    training, steps = config.training, length.steps
    if steps > MOST_STEPS:
        what = f"{training.max_train_epochs:,} epochs of {length.steps_per_epoch:,} steps are {steps:,} steps"
        return ("training", "max_train_epochs"), f"{what}; {MOST_STEPS:,} are the most", "train fewer epochs"
    every = training.checkpoints.every_n_steps
    assert every is not None
    count = math.ceil(steps / every)
    kept = min(count, training.checkpoints.keep or count)
    key = ("training", "checkpoints", "every_n_epochs" if training.checkpoints.every_n_epochs else "every_n_steps")
    if count > MOST_CHECKPOINTS:
        return key, f"this would save {count:,} checkpoints; {MOST_CHECKPOINTS:,} are the most", "save them more rarely"
    if kept * prompts > MOST_SAMPLES:
        what = f"{kept:,} checkpoints of {prompts:,} prompts would make {kept * prompts:,} samples"
        return key, f"{what}; {MOST_SAMPLES:,} are the most", "save fewer checkpoints, or take fewer prompts"
    return None


def checkpoint_steps(length: int, every: int) -> list[int]:
    """The steps at which checkpoints are saved: every n-th and the last."""
    return sorted({*range(every, length + 1, every), length})
