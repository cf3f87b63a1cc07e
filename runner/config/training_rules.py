"""Rules between keys of [training], and with those of [model] and [network]; each finding shows every place involved."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterator

from runner.config.locate import Path
from runner.config.source import Source
from runner.errors import Diagnostic
from runner.optim.kinds import OPTIMIZERS, class_problem
from schemas import RunConfig

ZERO_TERMINAL_SNR_SAMPLERS = (
    "ddim", "ddpm", "euler", "euler_a", "unipc", "dpm++_2m", "dpm++_2m_karras", "dpm++_sde", "dpm++_sde_karras",
)  # fmt: skip
"""Samplers whose diffusers class can rescale its betas; a test compares this with the classes."""


def conflict(source: Source, message: str, paths: list[Path], hint: str) -> Diagnostic:
    places = tuple(place for path in paths for place in source.key_places(path))
    return Diagnostic(message, places, hint)


def training_rules(config: RunConfig, source: Source) -> Iterator[Diagnostic]:
    training = config.training
    if training.timesteps.min >= training.timesteps.max:
        yield conflict(
            source, f"timesteps: min {training.timesteps.min} is not below max {training.timesteps.max}",
            [("training", "timesteps", "min"), ("training", "timesteps", "max")], "max is excluded: min = 0, max = 1000 is all of them",
        )  # fmt: skip
    known = {
        "cosine_with_restarts": {"num_cycles"}, "cosine": {"num_cycles"}, "polynomial": {"power", "lr_end"},
        "warmup_stable_decay": {"decay_ratio", "min_lr_ratio"}, "piecewise": {"boundaries", "factors"},
    }  # fmt: skip
    for name in training.scheduler.args:
        allowed = known.get(training.scheduler.type, set())
        if name not in allowed:
            listed = ", ".join(sorted(allowed)) or "no arguments"
            yield Diagnostic(
                f'the schedule "{training.scheduler.type}" has no argument `{name}`',
                source.key_places(("training", "scheduler", "args", name)), f"it takes {listed}",
            )  # fmt: skip
    if training.scheduler.type == "piecewise":
        yield from _piecewise(config, source)
    yield from _optimizer_args(config, source)
    yield from _memory(config, source)
    yield from _zero_snr_samplers(config, source)
    if training.max_train_steps is not None and (training.scheduler.warmup_steps or 0) > training.max_train_steps:
        yield conflict(
            source, f"the warm-up of {training.scheduler.warmup_steps} steps is longer than the run of {training.max_train_steps}",
            [("training", "scheduler", "warmup_steps"), ("training", "max_train_steps")], "shorten the warm-up",
        )  # fmt: skip
    if training.loss.zero_terminal_snr and config.model.prediction_type == "epsilon":
        yield conflict(
            source, "zero_terminal_snr makes the last step pure noise, from which epsilon cannot be learned",
            [("training", "loss", "zero_terminal_snr"), ("model", "prediction_type")], 'use prediction_type = "v_prediction"',
        )  # fmt: skip
    if training.loss.min_snr_gamma is not None and training.loss.debiased_estimation:
        yield conflict(
            source, "min_snr_gamma and debiased_estimation are two weightings of the same loss",
            [("training", "loss", "min_snr_gamma"), ("training", "loss", "debiased_estimation")], "keep one of them",
        )  # fmt: skip
    if training.mixed_precision == "fp16" and config.model.dtype == "bf16":
        yield conflict(
            source, "bf16 weights under fp16 computation lose range both ways",
            [("model", "dtype"), ("training", "mixed_precision")], "use one of the two for both",
        )  # fmt: skip


def _piecewise(config: RunConfig, source: Source) -> Iterator[Diagnostic]:
    args = config.training.scheduler.args
    boundaries, factors = args.get("boundaries"), args.get("factors")
    if not isinstance(boundaries, list) or not isinstance(factors, list) or len(factors) != len(boundaries) + 1:
        yield Diagnostic(
            'the schedule "piecewise" needs `boundaries` and one more of `factors`',
            source.value_places(("training", "scheduler", "type")),
            "args = { boundaries = [1000, 2000], factors = [1.0, 0.1, 0.01] }",
        )  # fmt: skip
    elif boundaries != sorted(boundaries) or not all(isinstance(step, int) for step in boundaries):
        yield Diagnostic(
            "`boundaries` must be whole numbers of steps, ascending",
            source.value_places(("training", "scheduler", "args", "boundaries")),
        )  # fmt: skip


def _memory(config: RunConfig, source: Source) -> Iterator[Diagnostic]:
    training, network = config.training, config.network
    fused: Path = ("training", "memory", "fused_backward")
    if training.memory.fused_backward:
        if network is not None:
            yield conflict(
                source, "fused_backward is for full fine-tunes; an adapter's gradients are small",
                [fused, ("network",)], "take fused_backward out",
            )  # fmt: skip
        if training.max_grad_norm > 0 and training.clip_grad == "global":
            yield conflict(
                source, f"fused_backward frees each gradient before the norm of all (max_grad_norm = {training.max_grad_norm:g}) is known",
                [fused, ("training", "max_grad_norm")], 'set training.clip_grad = "per_tensor", or max_grad_norm = 0',
            )  # fmt: skip
        if training.gradient_accumulation_steps > 1:
            yield conflict(
                source, "fused_backward takes a step with every batch, which leaves nothing to accumulate",
                [fused, ("training", "gradient_accumulation_steps")], "set gradient_accumulation_steps = 1, or take fused_backward out",
            )  # fmt: skip
        if training.mixed_precision == "fp16" or (training.mixed_precision is None and config.model.dtype == "fp16"):
            yield conflict(
                source, "fused_backward cannot look for overflows of fp16 before a step is taken",
                [fused, ("training", "mixed_precision")], 'use mixed_precision = "bf16"',
            )  # fmt: skip
    if network is None and training.components.denoiser and config.model.quantization != "none":
        yield conflict(
            source, f'quantization = "{config.model.quantization}" holds frozen weights, but without [network] the denoiser trains whole',
            [("model", "quantization"), ("training", "components")], "take quantization out, or add [network]",
        )  # fmt: skip
    if network is None and training.components.text_encoders and config.model.text_encoder_quantization != "none":
        yield conflict(
            source, "text_encoder_quantization holds frozen weights, but a text encoder trains whole",
            [("model", "text_encoder_quantization"), ("training", "components", training.components.text_encoders[0])],
            "take it out, or add [network]",
        )  # fmt: skip
    for name in ("quantization", "text_encoder_quantization"):
        if getattr(config.model, name) == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
            yield Diagnostic(
                f'{name} = "nf4" needs the package bitsandbytes, which is not installed',
                source.value_places(("model", name)), 'pip install bitsandbytes, or use "fp8_scaled"',
            )  # fmt: skip
    swap: Path = ("training", "memory", "blocks_to_swap")
    if training.memory.blocks_to_swap and network is None:
        yield conflict(
            source, "blocks_to_swap gives up a block's place on the device, which only a frozen block allows",
            [swap, ("training", "components")], "add [network], or use fused_backward, optimizer_offload and stochastic_rounding",
        )  # fmt: skip
    if training.memory.blocks_to_swap and training.compile:
        yield conflict(
            source, "blocks that come and go cannot be compiled", [swap, ("training", "compile")], "keep one of them",
        )  # fmt: skip
    if training.optimizer.stochastic_rounding and network is not None:
        yield conflict(
            source, "stochastic_rounding is for weights that train whole; adapters are kept in fp32",
            [("training", "optimizer", "stochastic_rounding"), ("network",)], "take it out",
        )  # fmt: skip
    if training.optimizer.type == "schedule_free_adamw" and (
        training.memory.fused_backward or training.memory.optimizer_offload or training.optimizer.stochastic_rounding
    ):
        yield conflict(
            source, "schedule_free_adamw changes between two sets of weights and cannot work tensor by tensor",
            [("training", "optimizer", "type")], "use adamw with fused_backward, optimizer_offload and stochastic_rounding",
        )  # fmt: skip
    rates = {training.learning_rate if value is True else float(value) for value in training.components.rates.values()}
    kind = OPTIMIZERS.get(training.optimizer.type)
    if (
        kind is not None
        and kind.one_rate
        and (len(rates) > 1 or (network is not None and network.lora_plus_ratio != 1))
    ):
        yield conflict(
            source, f'the optimizer "{training.optimizer.type}" finds one learning rate for everything; components cannot have their own',
            [("training", "optimizer", "type"), ("training", "components")], "set the components to true",
        )  # fmt: skip
    if training.optimizer.type == "prodigy" and training.learning_rate < 0.1:
        yield Diagnostic(
            f"prodigy finds the learning rate itself and multiplies it by learning_rate = {training.learning_rate:g}",
            source.key_places(("training", "learning_rate")), "set learning_rate = 1", "warning",
        )  # fmt: skip


def _optimizer_args(config: RunConfig, source: Source) -> Iterator[Diagnostic]:
    optimizer = config.training.optimizer
    kind = OPTIMIZERS.get(optimizer.type)
    if kind is None:
        problem = class_problem(optimizer.type)
        if problem is not None:
            near = difflib.get_close_matches(optimizer.type, OPTIMIZERS, 1, 0.5)
            yield Diagnostic(
                problem, source.value_places(("training", "optimizer", "type")),
                f'did you mean "{near[0]}"?' if near else f"there are {', '.join(OPTIMIZERS)}, and installed classes by full name",
            )  # fmt: skip
        return
    if kind.package is not None and importlib.util.find_spec(kind.package) is None:
        yield Diagnostic(
            f'the optimizer "{optimizer.type}" needs the package {kind.package}, which is not installed',
            source.value_places(("training", "optimizer", "type")), f'pip install {kind.package}, or use "adamw"',
        )  # fmt: skip
    for name in ("betas", "eps", "weight_decay"):
        if getattr(optimizer, name) is not None and name not in kind.defaults:
            yield Diagnostic(
                f'the optimizer "{optimizer.type}" has no `{name}`',
                source.key_places(("training", "optimizer", name)), "take it out",
            )  # fmt: skip
    known = kind.args
    for name, value in optimizer.args.items():
        path: Path = ("training", "optimizer", "args", name)
        if name not in known:
            yield Diagnostic(
                f'the optimizer "{optimizer.type}" has no argument `{name}`', source.key_places(path),
                f"it takes {', '.join(sorted(known))}; {' and '.join(kind.defaults)} are keys of [training.optimizer]",
            )  # fmt: skip
        elif type(value) is not known[name] and not (known[name] is float and type(value) is int):
            words = {bool: "true or false", int: "an integer", float: "a number"}
            yield Diagnostic(
                f"`{name}` of the optimizer must be {words[known[name]]}, not {value!r}", source.value_places(path)
            )


def _zero_snr_samplers(config: RunConfig, source: Source) -> Iterator[Diagnostic]:
    if not config.training.loss.zero_terminal_snr:
        return
    named: list[tuple[Path, str | None]] = [(("sampling", "sampler"), config.sampling.sampler)]
    named += [
        (("sampling", "prompts", i, "sampler"), prompt.sampler) for i, prompt in enumerate(config.sampling.prompts)
    ]
    for path, sampler in named:
        if sampler is not None and sampler not in ZERO_TERMINAL_SNR_SAMPLERS:
            yield conflict(
                source, f'the sampler "{sampler}" cannot start from pure noise, which zero_terminal_snr needs',
                [path, ("training", "loss", "zero_terminal_snr")], f"use one of {', '.join(ZERO_TERMINAL_SNR_SAMPLERS)}",
            )  # fmt: skip
