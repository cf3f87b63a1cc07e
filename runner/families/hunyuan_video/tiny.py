"""A checkpoint of the real classes, small enough that every path runs on a CPU in a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from runner.families.parts.files import CONFIGS
from runner.families.parts.tiny import write_clip, write_clip_tokenizer, write_settings
from runner.rng import forked

_TEXT = 24
TRANSFORMER: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": _TEXT,
    "pooled_projection_dim": 16,
    "rope_axes_dim": (4, 6, 6),
}


def write_tiny(folder: Path) -> None:
    """Writes a diffusers directory with random weights, always the same ones."""
    with forked(0, "tiny"):
        HunyuanVideoTransformer3DModel(**TRANSFORMER).save_pretrained(folder / "transformer")
        write_encoders(folder)
    write_settings(folder, CONFIGS / "hunyuan_video")


def write_encoders(folder: Path) -> None:
    """The autoencoder, both text encoders and their tokenizers."""
    AutoencoderKLHunyuanVideo(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, latent_channels=4, scaling_factor=0.9
    ).save_pretrained(folder / "vae")
    size = write_clip_tokenizer(folder / "tokenizer_2")
    write_clip(folder / "text_encoder_2", size, projected=False)
    words = write_llama_tokenizer(folder / "tokenizer")
    LlamaModel(
        LlamaConfig(
            hidden_size=_TEXT,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=words + 8,
            max_position_embeddings=1024,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    ).save_pretrained(folder / "text_encoder")


def write_llama_tokenizer(folder: Path, least: int = 0) -> int:
    """A tokenizer of LLaMA-3's kind over single letters, filled up to `least` tokens; returns the size of its vocabulary."""
    special = ["<|begin_of_text|>", "<|eot_id|>", "<pad>", "<|start_header_id|>", "<|end_header_id|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*special, *letters]
    words += [f"unused {number}" for number in range(least - len(words))]
    vocabulary = {token: index for index, token in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A", pair=f"{special[0]} $A {special[0]} $B", special_tokens=[(special[0], 0)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[2],
        model_max_length=8192,
    ).save_pretrained(folder)
    return len(vocabulary)
