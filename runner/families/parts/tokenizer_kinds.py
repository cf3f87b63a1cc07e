"""What the tokenizers of a kind of text encoder have in common; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.model.model import TokenizerKind

SPARE = 1000
"""Rows of an embedding that no token has, at most (LLaMA's and T5's)."""
TEXT = "a photo of a cat"


def clip_tokenizer(config: Mapping[str, Any]) -> TokenizerKind:
    size = int(config["vocab_size"])
    own = min(size, 49_408)  # words of textual inversion come after the ends
    ends = {"<|startoftext|>": own - 2, "<|endoftext|>": own - 1}
    return TokenizerKind(
        title="CLIP",
        size=size,
        spare=0,
        special=ends,
        vocabulary=49_408,
        words={"photo</w>": 1125, "of</w>": 539, "cat</w>": 2368},
        encoding=(49_406, 320, 1125, 539, 320, 2368, 49_407),
        load="runner.families.parts.text:load_clip",
        alone="merges.txt",
    )


def llama_3_tokenizer(config: Mapping[str, Any]) -> TokenizerKind:
    template = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return TokenizerKind(title="LLaMA 3", size=int(config["vocab_size"]), spare=SPARE, special=dict.fromkeys(template))


def t5_tokenizer(config: Mapping[str, Any]) -> TokenizerKind:
    ends = {"</s>": int(config.get("eos_token_id", 1)), "<pad>": int(config.get("pad_token_id", 0))}
    return TokenizerKind(
        title="T5",
        size=int(config["vocab_size"]),
        spare=SPARE,
        special=ends,
        vocabulary=32_128,
        words={"▁photo": 1202, "▁of": 13, "▁cat": 1712},
        encoding=(3, 9, 1202, 13, 3, 9, 1712, 1),
    )
