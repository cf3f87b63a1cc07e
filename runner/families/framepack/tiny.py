"""A checkpoint of the real classes, small enough that every path runs on a CPU in a fraction of a second."""

from __future__ import annotations

from pathlib import Path

from diffusers import HunyuanVideoFramepackTransformer3DModel
from transformers import SiglipVisionConfig, SiglipVisionModel

from runner.families.hunyuan_video.tiny import TRANSFORMER, write_encoders
from runner.families.parts.files import CONFIGS
from runner.families.parts.tiny import write_settings
from runner.rng import forked


def write_tiny(folder: Path) -> None:
    """Writes a diffusers directory with random weights, always the same ones."""
    with forked(0, "tiny"):
        HunyuanVideoFramepackTransformer3DModel(
            **TRANSFORMER, has_image_proj=True, image_proj_dim=20, has_clean_x_embedder=True
        ).save_pretrained(folder / "transformer")
        SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=20,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
            )
        ).save_pretrained(folder / "image_encoder")
        write_encoders(folder)
    write_settings(folder, CONFIGS / "framepack")
