"""Under which key the measured seconds of a step are remembered: what makes two steps alike on one machine."""

from __future__ import annotations

from runner.inputs.train import TrainInputs
from runner.plan.compile import Graph


def step_key(graph: Graph) -> str:
    """Model, kind of training, batch shapes, precision, device and what changes speed."""
    train, runtime = graph.of(TrainInputs), graph.runtime
    shapes = sorted({(group.bucket, group.batch_size, group.layout) for group in train.groups})
    kind = (
        "whole"
        if train.targets is None
        else f"{len(train.targets)} adapters of {sum(t.rank for t in train.targets)} ranks"
    )
    numerics = train.numerics
    parts = (
        *(train.weights[name].value for name in runtime.model.denoising),
        kind,
        sorted(train.components.rates),
        shapes,
        train.accumulation,
        numerics.dtype,
        numerics.mixed_precision,
        numerics.quantization,
        train.optimizer.type,
        train.optimizer.stochastic_rounding,
        train.ema is not None,
        train.latents_cached,
        train.texts_cached,
        runtime.compile,
        runtime.gradient_checkpointing,
        runtime.activation_offload,
        runtime.blocks_to_swap,
        runtime.fused_backward,
        runtime.optimizer_offload,
        runtime.attention,
        runtime.split_attention,
        runtime.deterministic,
        runtime.device,
    )
    return f"step {parts}"
