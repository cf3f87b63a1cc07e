"""What the tokenizers of a kind of text encoder have in common; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SPARE = 1000
"""Rows of an embedding that no token has, at most (LLaMA's and T5's)."""
TEXT = "a photo of a cat"
SPIECE = "spiece.model"


@dataclass(frozen=True)
class TokenizerKind:
    """The tokenizer that a text encoder asks for. The words are those of `TEXT`."""

    title: str
    size: int
    """Rows of the encoder's embedding."""
    spare: int
    special: Mapping[str, int | None]
    """Token → its id; None: any."""
    vocabulary: int = 0
    """Of the full-size encoder, whose tokenizer knows the words."""
    words: Mapping[str, int] = field(default_factory=dict)
    encoding: tuple[int, ...] = ()
    """The ids of `TEXT`."""
    load: str = "runner.families.parts.text:load_any"
    """By address: (folder) → tokenizer."""
    alone: str = SPIECE
    """The file that says how words become its tokens where there is no tokenizer.json. Those of merges.txt follow CLIP's
    rules."""


def clip_tokenizer(config: Mapping[str, Any]) -> TokenizerKind:
    size = int(config["vocab_size"])
    own = min(size, 49_408)  # words of textual inversion come after the ends
    ends = {"<|startoftext|>": own - 2, "<|endoftext|>": own - 1}
    return TokenizerKind(
        "CLIP", size, 0, ends, 49_408, {"photo</w>": 1125, "of</w>": 539, "cat</w>": 2368},
        (49_406, 320, 1125, 539, 320, 2368, 49_407), "runner.families.parts.text:load_clip", "merges.txt",
    )  # fmt: skip


def llama_3_tokenizer(config: Mapping[str, Any]) -> TokenizerKind:
    template = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return TokenizerKind("LLaMA 3", int(config["vocab_size"]), SPARE, dict.fromkeys(template))


def t5_tokenizer(config: Mapping[str, Any]) -> TokenizerKind:
    ends = {"</s>": int(config.get("eos_token_id", 1)), "<pad>": int(config.get("pad_token_id", 0))}
    return TokenizerKind(
        "T5", int(config["vocab_size"]), SPARE, ends, 32_128, {"▁photo": 1202, "▁of": 13, "▁cat": 1712},
        (3, 9, 1202, 13, 3, 9, 1712, 1),
    )  # fmt: skip
