"""A diffusion model as a training task: batches in, a scalar loss out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from runner.core.compile import compile_blocks
from runner.core.offload import saved_on_host
from runner.core.precision import autocast
from runner.core.task import Batch
from runner.diffusion.losses import distance, flow_weight, snr_weight
from runner.families.contract import Conditioning
from runner.inputs.train import TrainInputs
from runner.networks.merge import scale_down
from runner.networks.narrow import NarrowFactors
from runner.stages.context import Context, on_device
from runner.stages.denoising import Denoisers
from runner.stages.encode import LatentEncoding
from runner.stages.loader import StepLoader, batch_latents
from runner.stages.modules import Trained, denoising_blocks


class DiffusionTask:
    """Noise is added on the device; encodings come with the batch or are made here, where they vary or train."""

    def __init__(
        self,
        context: Context,
        inputs: TrainInputs,
        trained: Trained,
        loader: StepLoader,
        latents: LatentEncoding | None,
        text_encoders: Mapping[str, nn.Module] | None,
    ) -> None:
        self.context, self.inputs, self.trained, self.loader = context, inputs, trained, loader
        self.device = context.device
        self.parameters: Mapping[str, nn.Parameter] = trained.parameters
        self.process = context.family.process(context.numerics).on(context.device)
        self.latents = latents
        self.text_encoders = text_encoders
        self.tokenizers = context.family.load_tokenizers(context.runtime.model) if text_encoders is not None else {}
        self.text_trains = any(name in trained.modules for name in context.runtime.model.text_encoders)
        if context.runtime.gradient_checkpointing:
            for name, module in trained.modules.items():
                context.family.recompute(name, module)
        runtime = context.runtime
        self.compiling: set[tuple[int, ...]] | None = set() if runtime.compile else None
        if runtime.compile:
            compile_blocks(denoising_blocks(context, trained), _shapes(inputs, len(runtime.model.denoisers)))
        self.narrow = NarrowFactors(() if runtime.compile else trained.modules.values())
        self.weights = frozenset(
            parameter.untyped_storage().data_ptr()
            for module in trained.modules.values()
            for parameter in module.parameters()
        )
        self.denoisers = Denoisers(context.family, runtime.model, trained.modules)

    def steps_from(self, step: int) -> Iterator[list[Batch]]:
        return self.loader.steps_from(step)

    def train_mode(self, on: bool) -> None:
        for module in self.trained.modules.values():
            module.train(on)

    def stepped(self) -> None:
        self.narrow.clear()
        adapter = self.inputs.adapter
        if adapter is not None and adapter.scale_weight_norms is not None and self.inputs.targets is not None:
            scale_down(self.inputs.targets, self.trained.parameters, adapter.scale_weight_norms)

    def loss(self, batch: Batch) -> Tensor:
        tensors = batch.to(self.device).tensors
        if "latents" not in tensors:
            tensors |= self._encoded(batch, tensors.get("pixels"))
        latents = tensors["latents"]
        t = tensors["timesteps"]
        noisy = self.process.noisy(latents, tensors["noise"], t, tensors.get("input_noise"))
        if self.compiling is not None and tuple(noisy.x_t.shape) not in self.compiling:
            self.compiling.add(tuple(noisy.x_t.shape))
            size = "x".join(map(str, noisy.x_t.shape))
            self.context.events.emit(
                "note", text=f"compiling the denoiser's blocks for latents of {size}: this step is slow"
            )
        offload = saved_on_host(self.device, self.weights) if self.context.runtime.activation_offload else nullcontext()
        with autocast(self.inputs.numerics.mixed_precision, self.device), offload:
            self.narrow.refresh()
            conditioning = self._conditioning(batch, tensors)
            prediction = self.denoisers(noisy.x_t, noisy.t, batch.timesteps, conditioning)
        settings = self.inputs.loss
        mask = tensors.get("mask") if settings.masked is not False else None
        losses = distance(prediction, noisy.target, settings, t, noisy.snr, self.process.num_timesteps, mask)
        if self.process.prediction_type == "flow":
            weights = flow_weight(self.inputs.timesteps.weighting, t / self.process.num_timesteps)
        else:
            weights = snr_weight(settings, noisy.snr, self.process.prediction_type)
        return (losses * weights * tensors["weights"]).mean()

    def _conditioning(self, batch: Batch, tensors: Mapping[str, Tensor]) -> Conditioning:
        given = {name.removeprefix("cond."): tensor for name, tensor in tensors.items() if name.startswith("cond.")}
        if self.text_encoders is None:
            return given
        with torch.set_grad_enabled(self.text_trains and torch.is_grad_enabled()):
            return given | self.context.family.encode_texts(
                self.text_encoders, self.tokenizers, batch.texts, self.inputs.numerics, False
            )

    def _encoded(self, batch: Batch, pixels: Tensor | None) -> dict[str, Tensor]:
        assert self.latents is not None
        if pixels is not None:
            rows = self.latents.encode(batch.requests, list(pixels))
        else:
            pairs = zip(batch.requests, batch.clips, strict=True)
            rows = [self.latents.encode([request], [clip])[0] for request, clip in pairs]
        uses = zip(batch.items, batch.requests, rows, strict=True)
        learned = [self.loader.sources.learned(item, request.view, row) for item, request, row in uses]
        return on_device(batch_latents(learned), self.device)


def _shapes(inputs: TrainInputs, denoisers: int) -> int:
    """How many sizes of latents there are: of batches that several denoisers share, any number of items."""
    return sum(group.largest_batch if denoisers > 1 else 1 for group in inputs.groups)
