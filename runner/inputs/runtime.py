"""Where things lie and how they are done; torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.model.model import Model
from runner.model.targets import Target


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where things lie and how they are done; nothing here changes what a stage computes, `bits` aside."""

    model: Model
    base_folder: Path
    output_dir: Path
    name: str
    device: str
    deterministic: bool
    attention: str
    split_attention: bool
    compile: bool
    gradient_checkpointing: bool
    fused_backward: bool
    optimizer_offload: bool
    blocks_to_swap: int
    """Blocks that wait on the host while training."""
    sample_swap: int
    """The same for `runner sample`."""
    activation_offload: bool
    latents: str
    texts: str
    latent_batch_size: int
    text_batch_size: int
    vae_chunk_size: int | None
    sample_tile: int | None
    sample_chunk: int | None
    workers: int
    checkpoint_every: int
    keep: int | None
    state_every: int
    log_every: int
    tensorboard: bool
    sample_every: int | None
    sample_at_first: bool
    steps_per_epoch: int
    init_from: Path | None
    base_weights: tuple[tuple[Path, float], ...]
    layers: tuple[Target, ...]
    """Every layer that an adapter of a file may be for; filled where base_weights are given."""
    threads: int | None
    """CPU threads; None is PyTorch's own choice."""

    def bits(self) -> dict[str, Any]:
        """What may change the last bits of a result."""
        return {
            "run.deterministic": self.deterministic,
            "model.attention": self.attention,
            **({"model.split_attention": True} if self.split_attention else {}),
            **({"caching.vae_chunk_size": self.vae_chunk_size} if self.vae_chunk_size else {}),
            **({"sampling.vae_chunk_size": self.sample_chunk} if self.sample_chunk else {}),
            "training.compile": self.compile,
            "training.memory.gradient_checkpointing": self.gradient_checkpointing,
            "training.memory.fused_backward": self.fused_backward,
            "training.memory.optimizer_offload": self.optimizer_offload,
            "training.memory.blocks_to_swap": self.blocks_to_swap,
            "training.memory.activation_offload": self.activation_offload,
            "caching.latent_batch_size": self.latent_batch_size,
            "caching.text_batch_size": self.text_batch_size,
        }
