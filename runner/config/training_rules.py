"""Rules between keys of [training], and with those of [model] and [network]; each finding shows every place involved."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from runner.config.locate import Path
from runner.config.optimizer_rules import optimizer_rules, schedule_rules
from runner.config.prompt_options import PURE_NOISE_SAMPLERS, pure_noise_problem
from runner.config.source import Source, conflict
from runner.errors import Diagnostic
from schemas import RunConfig


def training_rules(config: RunConfig, source: Source) -> Iterator[Diagnostic]:
    training = config.training
    if training.timesteps.min >= training.timesteps.max:
        yield conflict(
            source,
            f"timesteps: min {training.timesteps.min} is not below max {training.timesteps.max}",
            [("training", "timesteps", "min"), ("training", "timesteps", "max")],
            "max is excluded: min = 0, max = 1000 is all of them",
        )
    yield from optimizer_rules(config, source)
    yield from schedule_rules(config, source)
    yield from _memory(config, source)
    sampler = config.sampling.sampler
    if training.loss.zero_terminal_snr and sampler is not None and sampler not in PURE_NOISE_SAMPLERS:
        message, hint = pure_noise_problem(sampler, "which zero_terminal_snr needs")
        yield conflict(source, message, [("sampling", "sampler"), ("training", "loss", "zero_terminal_snr")], hint)
    if training.loss.zero_terminal_snr and config.model.prediction_type == "epsilon":
        yield conflict(
            source,
            "zero_terminal_snr makes the last step pure noise, from which epsilon cannot be learned",
            [("training", "loss", "zero_terminal_snr"), ("model", "prediction_type")],
            'use prediction_type = "v_prediction"',
        )
    if training.loss.min_snr_gamma is not None and training.loss.debiased_estimation:
        yield conflict(
            source,
            "min_snr_gamma and debiased_estimation are two weightings of the same loss",
            [("training", "loss", "min_snr_gamma"), ("training", "loss", "debiased_estimation")],
            "keep one of them",
        )
    if training.mixed_precision == "fp16" and config.model.dtype == "bf16":
        yield conflict(
            source,
            "bf16 weights under fp16 computation lose range both ways",
            [("model", "dtype"), ("training", "mixed_precision")],
            "use one of the two for both",
        )


def _memory(config: RunConfig, source: Source) -> Iterator[Diagnostic]:
    training, network = config.training, config.network
    fused: Path = ("training", "memory", "fused_backward")
    if training.memory.fused_backward:
        if network is not None:
            yield conflict(
                source,
                "fused_backward is for full fine-tunes; an adapter's gradients are small",
                [fused, ("network",)],
                "take fused_backward out",
            )
        if training.max_grad_norm > 0 and training.clip_grad == "global":
            yield conflict(
                source,
                f"fused_backward frees each gradient before the norm of all (max_grad_norm = {training.max_grad_norm:g}) is known",
                [fused, ("training", "max_grad_norm")],
                'set training.clip_grad = "per_tensor", or max_grad_norm = 0',
            )
        if training.gradient_accumulation_steps > 1:
            yield conflict(
                source,
                "fused_backward takes a step with every batch, which leaves nothing to accumulate",
                [fused, ("training", "gradient_accumulation_steps")],
                "set gradient_accumulation_steps = 1, or take fused_backward out",
            )
        if training.mixed_precision == "fp16" or (training.mixed_precision is None and config.model.dtype == "fp16"):
            yield conflict(
                source,
                "fused_backward cannot look for overflows of fp16 before a step is taken",
                [fused, ("training", "mixed_precision")],
                'use mixed_precision = "bf16"',
            )
    if network is None and training.components.denoiser and config.model.quantization != "none":
        yield conflict(
            source,
            f'quantization = "{config.model.quantization}" holds frozen weights, but without [network] the denoiser trains whole',
            [("model", "quantization"), ("training", "components")],
            "take quantization out, or add [network]",
        )
    if network is None and training.components.text_encoders and config.model.text_encoder_quantization != "none":
        yield conflict(
            source,
            "text_encoder_quantization holds frozen weights, but a text encoder trains whole",
            [("model", "text_encoder_quantization"), ("training", "components", training.components.text_encoders[0])],
            "take it out, or add [network]",
        )
    for name in ("quantization", "text_encoder_quantization"):
        if getattr(config.model, name) == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
            yield Diagnostic(
                f'{name} = "nf4" needs the package bitsandbytes, which is not installed',
                source.value_places(("model", name)),
                'pip install bitsandbytes, or use "fp8_scaled"',
            )
    swap: Path = ("training", "memory", "blocks_to_swap")
    if training.memory.blocks_to_swap and network is None:
        yield conflict(
            source,
            "blocks_to_swap gives up a block's place on the device, which only a frozen block allows",
            [swap, ("training", "components")],
            "add [network], or use fused_backward, optimizer_offload and stochastic_rounding",
        )
    if training.memory.blocks_to_swap and training.compile:
        yield conflict(
            source, "blocks that come and go cannot be compiled", [swap, ("training", "compile")], "keep one of them"
        )
    if training.optimizer.stochastic_rounding and network is not None:
        yield conflict(
            source,
            "stochastic_rounding is for weights that train whole; adapters are kept in fp32",
            [("training", "optimizer", "stochastic_rounding"), ("network",)],
            "take it out",
        )
