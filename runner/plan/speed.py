"""Under which key the measured seconds of a step are remembered: what makes two steps alike on one machine."""

from __future__ import annotations

from runner.plan.compile import Graph


def step_key(graph: Graph) -> str:
    """Model, kind of training, batch shapes, precision, device and what changes speed."""
    train, runtime = graph.train, graph.runtime
    shapes = sorted({(group.bucket, group.batch_size) for group in train.groups})
    kind = (
        "whole"
        if train.targets is None
        else f"{len(train.targets)} adapters of {sum(t.rank for t in train.targets)} ranks"
    )
    parts = (
        train.weights["denoiser"], kind, shapes, train.accumulation, train.numerics.mixed_precision, runtime.compile,
        runtime.gradient_checkpointing, runtime.attention, runtime.device,
    )  # fmt: skip
    return f"step {parts}"
