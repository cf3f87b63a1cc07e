"""The figures under a plan: exact where they can be, predicted where they must be. docs/performance.md says how."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from runner.dataset.order import batch_counts, bucket_counts
from runner.families.spec import MemoryAnswer, MemoryQuestion
from runner.inputs import TrainInputs
from runner.networks.shapes import count_parameters
from runner.optim.kinds import state_bytes
from runner.plan.adapter_files import adapter_numbers
from runner.plan.device import has_gpu
from runner.plan.diff import Plan
from runner.plan.resolve import checkpoint_steps

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
ITEM_OVERHEAD = 232
"""Bytes of header and checksum around an encoded item."""
LIBRARIES = {"cpu": 500_000_000, "cuda": 900_000_000}
"""What the libraries themselves take: of a GPU CUDA's context and their kernels."""
PNG_SHARE = 0.55
"""A sample's PNG against its pixels' bytes."""
MP4_SHARE = 0.08
"""Bytes of a video for each pixel of each frame; an estimate, moving noise takes ten times as much."""
SAMPLE_OVERHEAD = 1000
"""Bytes of a sample's settings in its file."""


@dataclass(frozen=True)
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
            "predicted_peak_memory_bytes": self.peak,
            "memory_of": "GPU" if self.device == "cuda" else "CPU",
            "library_memory_bytes": LIBRARIES[self.device],
            "predicted_memory_bytes": dict(self.memory.phases),
            "predicted_disk_bytes": self.disk,
            "predicted_seconds": self.seconds,
        }


def _bucket(size: tuple[int, int], layout: str, **count: int) -> dict[str, Any]:
    return {"size": list(size), **({"layout": layout} if layout else {}), **count}


def figures(plan: Plan, seconds_per_step: float | None, device: Literal["cpu", "cuda"] | None = None) -> Figures:
    """The figures of a plan. `seconds_per_step` is what was measured on this machine, if anything was; `device` is what
    memory is asked of, where it is not run.device."""
    prepared = plan.prepared
    collection, config = prepared.collection, prepared.config
    trainable, layers = trained_numbers(plan)
    per_bucket: Counter[tuple[tuple[int, int], str]] = Counter()
    for group, count in zip(collection.groups, batch_counts(collection.groups, collection.cycle, 0), strict=True):
        per_bucket[group.bucket, group.layout] += count
    every = config.training.checkpoints.every_n_steps
    assert every is not None
    train = plan.actions["train"]
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
        memory=prepared.spec.memory(question),
        device=question.device,
        disk=disk_bytes(plan, trainable),
        seconds=seconds_per_step * train.missing if seconds_per_step is not None and train.pending else None,
    )


def _made_checkpoints(plan: Plan) -> int:
    """Those that training makes, or a finished one has."""
    runtime = plan.graph.runtime
    if plan.actions["train"].pending and runtime.keep is not None:
        return len(checkpoint_steps(plan.graph.train.steps, runtime.checkpoint_every))
    return len(plan.graph.sample.steps)


def trained_numbers(plan: Plan) -> tuple[int, int]:
    """(trainable parameters, layers with adapters or 0)."""
    prepared = plan.prepared
    if prepared.config.network is not None:
        return count_parameters(prepared.targets, prepared.config.network.decompose_factor), len(prepared.targets)
    return sum(prepared.model.components[name].parameters for name in prepared.config.training.components.rates), 0


def memory_question(plan: Plan, trainable: int, device: Literal["cpu", "cuda"] | None = None) -> MemoryQuestion:
    """What the family's memory model is asked; of run.device, where no other device is named."""
    if device is None:
        device = "cuda" if on_gpu(plan.graph.runtime.device) else "cpu"
    prepared, graph = plan.prepared, plan.graph
    config, runtime, train = prepared.config, graph.runtime, graph.train
    whole = train.targets is None
    trains = dict.fromkeys(config.training.components.rates, whole)
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
        encodes_latents=plan.actions["cache.latents"].pending or runtime.latents != "disk",
        encodes_text=plan.actions["cache.text"].pending
        or runtime.texts != "disk"
        or (plan.actions["sample"].pending and bool(graph.sample.prompts)),  # the prompts' own texts
        sample_size=max(((prompt.width, prompt.height) for prompt in graph.sample.prompts), key=prod, default=None),
        samples_in_training=bool(graph.sample.prompts)
        and (runtime.sample_every is not None or runtime.sample_at_first),
        whole_bytes=2 if train.optimizer.stochastic_rounding else 4,
        fused_backward=runtime.fused_backward,
        blocks_to_swap=runtime.blocks_to_swap if device == "cuda" else 0,
        activation_offload=runtime.activation_offload,
        quantization=numerics.quantization,
        text_encoder_quantization=numerics.text_encoder_quantization,
        vae_tile=graph.latents.encoder.tile_size,
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
    model, items = plan.prepared.model, plan.graph.train.items
    if not model.makes_video:
        return {}
    factor = model.frame_factor
    prompts = plan.graph.sample.prompts
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


def disk_bytes(plan: Plan, trainable: int) -> dict[str, int]:
    """Bytes of the files that this plan adds to the store, by kind (their lengths, not rounded up to blocks)."""
    prepared, graph = plan.prepared, plan.graph
    model, numerics = prepared.model, graph.train.numerics
    stored = BYTES[prepared.config.caching.dtype or "fp32"]
    found = {
        "latents": _latent_bytes(plan, stored),
        "text": _text_bytes(plan, stored),
    }
    if plan.actions["train"].pending:
        kinds = 2 if graph.train.ema is not None else 1
        every, keep = graph.runtime.checkpoint_every, graph.runtime.keep
        count = len(checkpoint_steps(graph.train.steps, every))
        kept = count if keep is None else min(count, keep + 1)
        number = 2 if graph.train.optimizer.stochastic_rounding else 4
        found["checkpoints"] = kept * kinds * trainable * number
        found["state"] = int(trainable * (number + state_bytes(graph.train.optimizer.type) + (4 if kinds == 2 else 0)))
    samples = _sample_bytes(plan)
    if samples:
        found["samples"] = samples
    if plan.actions["publish"].pending:
        found["exports"] = _export_bytes(plan, trainable)
    assert numerics.family == model.family
    return found


def _sample_bytes(plan: Plan) -> int:
    """Of the pictures and videos that are missing: of the base model, of each checkpoint, and those between them."""
    runtime, prompts, sample = plan.graph.runtime, plan.graph.sample.prompts, plan.actions["sample"]
    if not prompts or not sample.pending:
        return 0
    between = 0
    if plan.actions["train"].pending and runtime.sample_every is not None:
        steps = plan.graph.train.steps
        saved = set(checkpoint_steps(steps, runtime.checkpoint_every))
        between = sum(step not in saved for step in range(runtime.sample_every, steps + 1, runtime.sample_every))
    each = SAMPLE_OVERHEAD * len(prompts)
    for prompt in prompts:
        pixels = prompt.width * prompt.height
        each += int(pixels * 3 * PNG_SHARE) + (int(pixels * prompt.frames * MP4_SHARE) if prompt.is_video else 0)
    return int((sample.missing / len(prompts) + between) * each)


def _latent_bytes(plan: Plan, stored: int) -> int:
    """Of the latents that are missing, each of the mean size of all items."""
    model, items = plan.prepared.model, plan.prepared.collection.items
    missing = plan.actions["cache.latents"].missing
    if not missing or not items:
        return 0
    frames = {id(item): (item.clip.length - 1) // model.frame_factor + 1 for item in items if item.clip is not None}
    area = sum(prod(item.fit.bucket) * (frames.get(id(item), 1) + len(item.controls)) for item in items) / len(items)
    image = (
        model.image_tokens * int(model.components["image_encoder"].config["hidden_size"]) if model.image_tokens else 0
    )
    return int(missing * ((area / model.latent_factor**2 * model.latent_channels + image) * stored + ITEM_OVERHEAD))


def _text_bytes(plan: Plan, stored: int) -> int:
    model = plan.prepared.model
    numbers = model.text_tokens * model.text_width + model.text_extra
    return int(plan.actions["cache.text"].missing * (numbers * stored + ITEM_OVERHEAD))


def _export_bytes(plan: Plan, trainable: int) -> int:
    prepared, graph = plan.prepared, plan.graph
    number = BYTES[graph.publish.dtype]
    everything = sum(component.parameters for component in prepared.model.components.values())
    denoiser = prepared.model.components["denoiser"].parameters
    adapter = graph.train.targets is not None
    targets = graph.train.targets or ()
    sizes = {
        "kohya": adapter_numbers(targets, "kohya", trainable), "diffusers": trainable if adapter else everything,
        "comfyui": adapter_numbers(targets, "comfyui", trainable) if adapter else denoiser, "single_file": everything,
    }  # fmt: skip
    forms = {("kohya" if adapter else "single_file", "best"): 1}
    for target in graph.publish.targets:
        count = 1 if target.which == "best" else len(graph.select.steps) * (2 if graph.select.ema else 1)
        forms[target.format, target.which] = count
    if any(which == "all" for _, which in forms):
        forms = {(form, which): n for (form, which), n in forms.items() if which == "all" or (form, "all") not in forms}
    return sum(count * sizes[form] * number for (form, _), count in forms.items())
