"""The figures under a plan: exact where they can be, predicted where they must be. docs/performance.md says how."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from runner.config.optimizer_kinds import state_bytes
from runner.dataset.order import batch_counts, bucket_counts
from runner.families.spec import MemoryAnswer, MemoryQuestion
from runner.inputs.cache import LatentsInputs, TextsInputs
from runner.inputs.sample import SampleInputs
from runner.inputs.train import TrainInputs
from runner.plan.device import has_gpu
from runner.plan.diff import Plan
from runner.plan.resolve import checkpoint_steps
from runner.plan.stages.cache import BYTES
from runner.plan.stages.train import trained_numbers

LIBRARIES = {"cpu": 500_000_000, "cuda": 900_000_000}
"""What the libraries themselves take: of a GPU CUDA's context and their kernels."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a plan says about size and length."""

    items: int
    held_out: int
    regularization: int
    excluded: list[tuple[str, str]]
    buckets: list[tuple[tuple[int, int], str, int]]
    batches_per_epoch: list[tuple[tuple[int, int], str, int]]
    steps: int
    steps_per_epoch: int
    epochs: float
    checkpoints: int
    checkpoint_every: int
    trainable: int
    trained_layers: int
    denoisers: list[tuple[str, float, float | None]]
    """Each with the timesteps that are its own: from, and below (None: to the end); none where there is only one."""
    memory: MemoryAnswer
    """Without the libraries' own."""
    device: Literal["cpu", "cuda"]
    """What `memory` is of."""
    disk: dict[str, int]
    seconds: float | None

    @property
    def peak(self) -> int:
        """Predicted bytes at the peak, the libraries included."""
        return self.memory.peak + LIBRARIES[self.device]

    def as_record(self) -> dict[str, Any]:
        """The figures for `--json`."""
        return {
            "items": self.items,
            "held_out": self.held_out,
            "regularization": self.regularization,
            "excluded": [{"name": name, "reason": reason} for name, reason in self.excluded],
            "buckets": [_bucket(size, layout, items=count) for size, layout, count in self.buckets],
            "batches_per_epoch": [
                _bucket(size, layout, batches=count) for size, layout, count in self.batches_per_epoch
            ],
            "steps": self.steps,
            "steps_per_epoch": self.steps_per_epoch,
            "epochs": round(self.epochs, 4),
            "checkpoints": self.checkpoints,
            "trainable_parameters": self.trainable,
            **({"denoisers": [_range(*own) for own in self.denoisers]} if self.denoisers else {}),
            "predicted_peak_memory_bytes": self.peak,
            "memory_of": "GPU" if self.device == "cuda" else "CPU",
            "library_memory_bytes": LIBRARIES[self.device],
            "predicted_memory_bytes": dict(self.memory.phases),
            "predicted_disk_bytes": self.disk,
            "predicted_seconds": self.seconds,
        }


def _range(component: str, low: float, high: float | None) -> dict[str, Any]:
    return {"component": component, "from_timestep": low, "below_timestep": high}


def _bucket(size: tuple[int, int], layout: str, **count: int) -> dict[str, Any]:
    return {"size": list(size), **({"layout": layout} if layout else {}), **count}


def figures(plan: Plan, seconds_per_step: float | None, device: Literal["cpu", "cuda"] | None = None) -> Figures:
    """The figures of a plan. `seconds_per_step` is what was measured on this machine, if anything was; `device` is what
    memory is asked of, where it is not run.device."""
    prepared = plan.prepared
    collection, config = prepared.collection, prepared.config
    trainable, layers = trained_numbers(prepared)
    per_bucket: Counter[tuple[tuple[int, int], str]] = Counter()
    for group, count in zip(collection.groups, batch_counts(collection.groups, collection.cycle, 0), strict=True):
        per_bucket[group.bucket, group.layout] += count
    every = config.training.checkpoints.every_n_steps
    assert every is not None
    train = plan.action(TrainInputs)
    question = memory_question(plan, trainable, device)
    return Figures(
        items=len(collection.items),
        held_out=len(collection.held_out),
        regularization=sum(1 for item in collection.items if item.settings.regularization),
        excluded=[(item.name, item.reason) for item in collection.bad],
        buckets=bucket_counts(collection.groups),
        batches_per_epoch=sorted((size, layout, count) for (size, layout), count in per_bucket.items()),
        steps=prepared.length.steps,
        steps_per_epoch=prepared.length.steps_per_epoch,
        epochs=prepared.length.epochs,
        checkpoints=_made_checkpoints(plan),
        checkpoint_every=every,
        trainable=trainable,
        trained_layers=layers,
        denoisers=prepared.model.ranges if len(prepared.model.denoisers) > 1 else [],
        memory=predicted_memory(plan, question),
        device=question.device,
        disk=disk_bytes(plan),
        seconds=seconds_per_step * train.missing if seconds_per_step is not None and train.pending else None,
    )


def _made_checkpoints(plan: Plan) -> int:
    """Those that training makes, or a finished one has."""
    runtime = plan.graph.runtime
    if plan.action(TrainInputs).pending and runtime.keep is not None:
        return len(checkpoint_steps(plan.prepared.length.steps, runtime.checkpoint_every))
    return len(plan.graph.of(SampleInputs).steps)


def memory_question(plan: Plan, trainable: int, device: Literal["cpu", "cuda"] | None = None) -> MemoryQuestion:
    """What the family's memory model is asked; of run.device, where no other device is named."""
    if device is None:
        device = "cuda" if on_gpu(plan.graph.runtime.device) else "cpu"
    prepared, graph = plan.prepared, plan.graph
    config, runtime, train = prepared.config, graph.runtime, graph.of(TrainInputs)
    prompts = graph.of(SampleInputs).prompts
    whole = train.targets is None
    trains = dict.fromkeys(prepared.model.rates(config.training.components.rates), whole)
    batch, size = _largest_batch(train)
    numerics = train.numerics
    return MemoryQuestion(
        model=prepared.model,
        trains=trains,
        trainable=trainable,
        frozen_bytes=BYTES[numerics.dtype],
        vae_bytes=BYTES[numerics.vae_dtype],
        compute_bytes=4 if numerics.mixed_precision == "no" else 2,
        optimizer_bytes=state_bytes(train.optimizer.type),
        ema=train.ema is not None,
        batch=batch,
        size=size,
        checkpointing=runtime.gradient_checkpointing,
        eager_attention=runtime.attention == "eager",
        latent_batch=runtime.latent_batch_size,
        text_batch=runtime.text_batch_size,
        text_tokens=prepared.model.text_tokens,
        encodes_latents=plan.action(LatentsInputs).pending or runtime.latents != "disk",
        encodes_text=plan.action(TextsInputs).pending
        or runtime.texts != "disk"
        or (plan.action(SampleInputs).pending and bool(prompts)),  # the prompts' own texts
        sample_size=max(((prompt.width, prompt.height) for prompt in prompts), key=prod, default=None),
        samples_in_training=bool(prompts) and (runtime.sample_every is not None or runtime.sample_at_first),
        whole_bytes=2 if train.optimizer.stochastic_rounding else 4,
        fused_backward=runtime.fused_backward,
        blocks_to_swap=runtime.blocks_to_swap if device == "cuda" else 0,
        activation_offload=runtime.activation_offload,
        quantization=numerics.quantization,
        text_encoder_quantization=numerics.text_encoder_quantization,
        vae_tile=graph.of(LatentsInputs).encoder.tile_size,
        vae_chunk=runtime.vae_chunk_size,
        sample_tile=runtime.sample_tile,
        sample_chunk=runtime.sample_chunk,
        **_video_question(plan, size),
        optimizer_offload=runtime.optimizer_offload,
        latents_cached=runtime.latents != "off",
        text_cached=runtime.texts != "off",
        targets={f"{target.component}.{target.name}": target.rank for target in train.targets or ()},
        device=device,
    )


def _video_question(plan: Plan, size: tuple[int, int]) -> dict[str, int]:
    """Frames that are trained, encoded, made and decoded at once."""
    model, items = plan.prepared.model, plan.graph.of(TrainInputs).items
    if not model.makes_video:
        return {}
    factor = model.frame_factor
    prompts = plan.graph.of(SampleInputs).prompts
    made = max((prompt.latent_frames(factor, model.window) for prompt in prompts), default=1)
    longest = max((prompt.frames for prompt in prompts), default=1)
    return {
        "frames": max(item.latent_frames(factor) for item in items if item.fit.bucket == size),
        "clip_frames": max(item.clip.length if item.clip else 1 for item in items),
        "sample_frames": made,
        "decoded_frames": longest if not model.window else min(longest, 2 * factor * model.window + 1),
    }


def on_gpu(device: str) -> bool:
    """Whether run.device will be a GPU."""
    return device.startswith("cuda") or (device == "auto" and has_gpu())


def _largest_batch(train: TrainInputs) -> tuple[int, tuple[int, int]]:
    """The batch that needs most memory: its length and its bucket."""
    candidates = [
        (group.largest_batch, group.bucket, train.items[group.items[0]].latent_frames(4)) for group in train.groups
    ]
    batch, bucket, _ = max(candidates, key=lambda item: (item[0] * prod(item[1]) * item[2], item))
    return batch, bucket


def disk_bytes(plan: Plan) -> dict[str, int]:
    """Bytes of the files that this plan adds to the store, by kind (their lengths, not rounded up to blocks)."""
    found: dict[str, int] = {}
    for node in plan.graph.nodes.values():
        if node.known_after is None:
            found |= node.stage.disk(node.inputs, plan)
    return found


def predicted_memory(plan: Plan, question: MemoryQuestion) -> MemoryAnswer:
    """Of the family's phases, and of what stages say beside them."""
    phases = dict(plan.prepared.spec.memory(question).phases)
    for node in plan.graph.nodes.values():
        if node.known_after is None:
            phases |= node.stage.memory(node.inputs, plan)
    return MemoryAnswer(phases)
