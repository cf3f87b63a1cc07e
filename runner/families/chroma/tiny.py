"""A checkpoint of the real classes, small enough that every path runs on a CPU in a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import ChromaTransformer2DModel

from runner.families.parts.files import CONFIGS
from runner.families.parts.tiny import write_settings, write_t5, write_vae
from runner.rng import forked

TRANSFORMER: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
    "approximator_num_channels": 64,
    "approximator_hidden_dim": 40,
    "approximator_layers": 2,
}


def write_tiny(folder: Path) -> None:
    """Writes a diffusers directory with random weights, always the same ones."""
    with forked(0, "tiny"):
        ChromaTransformer2DModel(**TRANSFORMER).save_pretrained(folder / "transformer")
        write_vae(folder / "vae", shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)
        write_t5(folder / "text_encoder", folder / "tokenizer", TRANSFORMER["joint_attention_dim"])
    write_settings(folder, CONFIGS / "chroma")
