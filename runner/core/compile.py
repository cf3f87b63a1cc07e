"""torch.compile of a model's repeated blocks: one small graph that all of them share, instead of one of the whole model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def compile_blocks(blocks: Sequence[nn.Module], shapes: int) -> None:
    """Compiles each block in place, for `shapes` sizes of input; a graph is made when a size first comes.

    Sizes are compiled as they are: graphs for any size are slower, and a run has few buckets.
    """
    import torch._dynamo

    limit = 4 * shapes + 8
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    torch._dynamo.config.accumulated_recompile_limit = max(
        torch._dynamo.config.accumulated_recompile_limit, limit * len(blocks)
    )
    for block in blocks:
        block.compile(dynamic=False)
