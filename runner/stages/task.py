"""A diffusion model as a training task: batches in, a scalar loss out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from runner.core.precision import autocast
from runner.core.task import Batch
from runner.data.loader import StepLoader
from runner.diffusion.losses import distance, snr_weight
from runner.families.contract import Conditioning
from runner.inputs import TrainInputs
from runner.stages.context import Context
from runner.stages.encode import LatentEncoding
from runner.stages.modules import Trained


class DiffusionTask:
    """Noise is added on the device; encodings come with the batch or are made here, where they vary or train."""

    def __init__(
        self, context: Context, inputs: TrainInputs, trained: Trained, loader: StepLoader,
        latents: LatentEncoding | None, text_encoder: nn.Module | None,
    ) -> None:  # fmt: skip
        self.context, self.inputs, self.trained, self.loader = context, inputs, trained, loader
        self.device = context.device
        self.parameters: Mapping[str, nn.Parameter] = trained.parameters
        self.process = context.family.process(context.numerics)
        self.latents = latents
        self.text_encoder = text_encoder
        self.tokenizer = context.family.load_tokenizer(context.runtime.model) if text_encoder is not None else None
        denoiser: Any = trained.modules["denoiser"]
        if context.runtime.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
            if "text_encoder_1" in trained.modules:
                encoder: Any = trained.modules["text_encoder_1"]
                encoder.gradient_checkpointing_enable()
        self.called: Any = torch.compile(denoiser) if context.runtime.compile else denoiser

    def steps_from(self, step: int) -> Iterator[list[Batch]]:
        return self.loader.steps_from(step)

    def train_mode(self, on: bool) -> None:
        for module in self.trained.modules.values():
            module.train(on)

    def loss(self, batch: Batch) -> Tensor:
        tensors = batch.to(self.device).tensors
        latents = tensors["latents"] if "latents" in tensors else self._encoded(batch, tensors["pixels"])
        t = tensors["timesteps"]
        noisy = self.process.noisy(latents, tensors["noise"], t, tensors.get("input_noise"))
        with autocast(self.inputs.numerics.mixed_precision, self.device):
            prediction = self.context.family.denoise(self.called, noisy.x_t, t, self._conditioning(batch, tensors))
        settings = self.inputs.loss
        losses = distance(prediction, noisy.target, settings, t, noisy.snr, self.process.num_timesteps)
        weights = snr_weight(settings, noisy.snr, self.process.prediction_type)
        return (losses * weights * tensors["weights"]).mean()

    def _conditioning(self, batch: Batch, tensors: Mapping[str, Tensor]) -> Conditioning:
        if self.text_encoder is None:
            return {name.removeprefix("cond."): tensor for name, tensor in tensors.items() if name.startswith("cond.")}
        trains = "text_encoder_1" in self.trained.modules
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            return self.context.family.encode_texts(
                self.text_encoder, self.tokenizer, batch.texts, self.inputs.numerics, False
            )

    def _encoded(self, batch: Batch, pixels: Tensor) -> Tensor:
        assert self.latents is not None
        rows = self.latents.encode(batch.requests, list(pixels))
        return torch.stack([row["latents"] for row in rows]).to(self.device, torch.float32)
