"""A checkpoint of the real classes, small enough that every path runs on a CPU in a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import SD3Transformer2DModel
from transformers import T5Config, T5EncoderModel

from runner.families.parts.files import CONFIGS
from runner.families.parts.tiny import write_clip, write_clip_tokenizer, write_settings, write_t5_tokenizer, write_vae
from runner.rng import forked

_WIDTH = 48
_TRANSFORMER: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "joint_attention_dim": _WIDTH,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 16 + 24,
    "pos_embed_max_size": 64,
}


def write_tiny(folder: Path, **changes: Any) -> None:
    """Writes a diffusers directory with random weights, always the same ones."""
    size = write_clip_tokenizer(folder / "tokenizer")
    write_clip_tokenizer(folder / "tokenizer_2", pad="!")
    words = write_t5_tokenizer(folder / "tokenizer_3")
    t5 = T5Config(
        d_model=_WIDTH,
        d_kv=8,
        num_heads=2,
        d_ff=32,
        num_layers=2,
        vocab_size=words,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        is_encoder_decoder=True,
    )
    with forked(0, "tiny"):
        SD3Transformer2DModel(**{**_TRANSFORMER, **changes}).save_pretrained(folder / "transformer")
        write_vae(folder / "vae", latent_channels=8, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)
        write_clip(folder / "text_encoder", size, projected=True)
        write_clip(
            folder / "text_encoder_2", size, projected=True, hidden_size=24, projection_dim=24, hidden_act="gelu"
        )
        T5EncoderModel(t5).save_pretrained(folder / "text_encoder_3")
    write_settings(folder, CONFIGS / "sd3")
