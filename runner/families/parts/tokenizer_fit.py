"""Whether a tokenizer is that of its text encoder: the size of its vocabulary, the ids of its ends, and of words that every
tokenizer of the full-size encoder has. From the tokenizer's own files; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.families.parts.files import read_json
from runner.families.spec import ModelProblem

SPARE = 1000
"""Rows of an embedding that no token has, at most (LLaMA's and T5's)."""
TEXT = "a photo of a cat"
SPIECE = "spiece.model"


@dataclass(frozen=True)
class Kind:
    """What the tokenizers of one kind of text encoder have in common. The words are those of `TEXT`."""

    title: str
    spare: int
    special: Mapping[str, int | None]
    """Token → its id; None: any."""
    vocabulary: int = 0
    """Of the full-size encoder, whose tokenizer knows the words."""
    words: Mapping[str, int] = field(default_factory=dict)
    encoding: tuple[int, ...] = ()
    """The ids of `TEXT`."""


def kind_of(config: Mapping[str, Any]) -> Kind:
    """The kind that a text encoder's configuration asks for."""
    size = int(config["vocab_size"])
    if "num_key_value_heads" in config:
        template = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        return Kind("LLaMA 3", SPARE, dict.fromkeys(template))
    if "max_position_embeddings" in config:
        own = min(size, 49_408)  # words of textual inversion come after the ends
        ends = {"<|startoftext|>": own - 2, "<|endoftext|>": own - 1}
        return Kind("CLIP", 0, ends, 49_408, {"photo</w>": 1125, "of</w>": 539, "cat</w>": 2368}, (49_406, 320, 1125, 539, 320, 2368, 49_407))  # fmt: skip
    ends = {"</s>": int(config.get("eos_token_id", 1)), "<pad>": int(config.get("pad_token_id", 0))}
    return Kind("T5", SPARE, ends, 32_128, {"▁photo": 1202, "▁of": 13, "▁cat": 1712}, (3, 9, 1202, 13, 3, 9, 1712, 1))


def misfit(folder: Path, config: Mapping[str, Any]) -> str | None:
    """What shows that a folder's tokenizer is another encoder's; None where nothing does. Raises `ModelProblem`."""
    tokens = _tokens(folder)
    kind, wanted = kind_of(config), int(config["vocab_size"])
    size = max(tokens.values(), default=-1) + 1
    if not wanted - kind.spare <= size <= wanted:
        return f"the tokenizer in {folder} has {size:,} tokens, the text encoder {wanted:,}"
    for token, number in kind.special.items():
        if token not in tokens:
            return f"the tokenizer in {folder} is not {kind.title}'s: it has no token {token}"
        if number is not None and tokens[token] != number:
            return f"the tokenizer in {folder} is not {kind.title}'s: {token} is its token {tokens[token]:,}, in the text encoder it is {number:,}"  # fmt: skip
    if kind.vocabulary and wanted >= kind.vocabulary:
        for token, number in kind.words.items():
            if tokens.get(token, number) != number:
                return f"the tokenizer in {folder} is not {kind.title}'s: {token} is its token {tokens[token]:,}, in the text encoder it is {number:,}"  # fmt: skip
    return None


def _tokens(folder: Path) -> dict[str, int]:
    """Token → id, added ones included. Raises `ModelProblem`."""
    try:
        if (folder / "tokenizer.json").is_file():
            content = read_json(folder / "tokenizer.json")
            vocabulary = content["model"]["vocab"]
            found = dict(vocabulary) if isinstance(vocabulary, dict) else {entry[0]: index for index, entry in enumerate(vocabulary)}  # fmt: skip
            added = {entry["content"]: entry["id"] for entry in content.get("added_tokens") or []}
        elif (folder / "vocab.json").is_file():
            found, added = read_json(folder / "vocab.json"), {}
            if (folder / "added_tokens.json").is_file():
                added = read_json(folder / "added_tokens.json")
        else:
            found, added = _with_extra(sentence_pieces(folder / SPIECE)), {}
        return {str(token): int(number) for token, number in {**found, **added}.items()}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError):
        raise ModelProblem(("model",), f"the tokenizer in {folder} is damaged: its vocabulary cannot be read") from None


def sentence_pieces(file: Path) -> Any:
    """T5's model of SentencePiece. Raises `ValueError`."""
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError):
        raise ValueError("no SentencePiece model") from None


def _with_extra(model: Any) -> dict[str, int]:
    """Its tokens, with the hundred that T5's tokenizers add."""
    size = model.get_piece_size()
    found = {model.id_to_piece(number): number for number in range(size)}
    return {**found, **{f"<extra_id_{number}>": size + 99 - number for number in range(100)}}
