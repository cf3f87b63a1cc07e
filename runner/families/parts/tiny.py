"""Pieces of the tiny checkpoints: real classes, small random weights, always the same ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 32,
    "scaling_factor": 0.9,
}
_CLIP: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 16,
}


def write_vae(folder: Path, **changes: Any) -> None:
    AutoencoderKL(**{**VAE, **changes}).save_pretrained(folder)


def write_clip_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> int:
    """A tokenizer of single letters; returns the size of its vocabulary."""
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77, pad_token=pad).save_pretrained(folder)
    return len(tokens)


def write_clip(folder: Path, vocabulary: int, projected: bool, **changes: Any) -> None:
    config = CLIPTextConfig(
        **{**_CLIP, **changes},
        vocab_size=vocabulary,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).save_pretrained(folder)


def write_settings(folder: Path, shipped: Path, scheduler: Mapping[str, Any] | None = None) -> None:
    """model_index.json and the scheduler's configuration, those of the full-size model."""
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    for name in ("scheduler/scheduler_config.json", "model_index.json"):
        content = json.loads((shipped / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")


def write_t5_tokenizer(folder: Path, least: int = 0) -> int:
    """A tokenizer of T5's kind over single letters, filled up to `least` tokens; returns the size of its vocabulary."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(chr(code) for code in range(33, 127))]
    pieces += [f"unused {number}" for number in range(least - len(pieces))]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(index)) for index, piece in enumerate(pieces)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    ).save_pretrained(folder)
    return len(pieces)


def write_t5(folder: Path, tokenizer: Path, width: int) -> None:
    """A T5 of a transformer's width [width], and its tokenizer."""
    T5EncoderModel(
        T5Config(
            d_model=width,
            d_kv=8,
            num_heads=2,
            d_ff=32,
            num_layers=2,
            vocab_size=write_t5_tokenizer(tokenizer),
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            is_encoder_decoder=True,
        )
    ).save_pretrained(folder)
