"""Checkpoints of the real classes, small enough that every path runs on a CPU in a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel

from runner.families.parts.files import CONFIGS
from runner.families.parts.tiny import write_clip, write_clip_tokenizer, write_settings, write_vae
from runner.rng import forked

_UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}
_SDXL_UNET: dict[str, Any] = {
    **_UNET,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [2, 4],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 24,
    "cross_attention_dim": 16 + 24,
}


def write_tiny(folder: Path) -> None:
    """Writes a diffusers directory of Stable Diffusion 1.5 with random weights, always the same ones."""
    size = write_clip_tokenizer(folder / "tokenizer")
    with forked(0, "tiny"):
        UNet2DConditionModel(**_UNET).save_pretrained(folder / "unet")
        write_vae(folder / "vae")
        write_clip(folder / "text_encoder", size, projected=False)
    write_settings(folder, CONFIGS / "sd15")


def write_tiny_sdxl(folder: Path) -> None:
    """The same of Stable Diffusion XL."""
    size = write_clip_tokenizer(folder / "tokenizer")
    write_clip_tokenizer(folder / "tokenizer_2", pad="!")
    with forked(0, "tiny"):
        UNet2DConditionModel(**_SDXL_UNET).save_pretrained(folder / "unet")
        write_vae(folder / "vae", force_upcast=True)
        write_clip(folder / "text_encoder", size, projected=False)
        write_clip(
            folder / "text_encoder_2", size, projected=True, hidden_size=24, projection_dim=24, hidden_act="gelu"
        )
    write_settings(folder, CONFIGS / "sdxl")
