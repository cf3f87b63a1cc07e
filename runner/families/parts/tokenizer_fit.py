"""Whether a tokenizer is that of its text encoder: the size of its vocabulary, the ids of its ends, and of words that every
tokenizer of the full-size encoder has. From the tokenizer's own files; torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runner.families.parts.files import read_json
from runner.model.model import SPIECE, ModelProblem, TokenizerKind


def misfit(folder: Path, kind: TokenizerKind) -> str | None:
    """What shows that a folder's tokenizer is of another kind; None where nothing does. Raises `ModelProblem`."""
    tokens, wanted = _tokens(folder), kind.size
    size = max(tokens.values(), default=-1) + 1
    if not wanted - kind.spare <= size <= wanted:
        return f"the tokenizer in {folder} has {size:,} tokens, the text encoder {wanted:,}"
    for token, number in kind.special.items():
        if token not in tokens:
            return f"the tokenizer in {folder} is not {kind.title}'s: it has no token {token}"
        if number is not None and tokens[token] != number:
            return f"the tokenizer in {folder} is not {kind.title}'s: {token} is its token {tokens[token]:,}, in the text encoder it is {number:,}"
    if kind.vocabulary and wanted >= kind.vocabulary:
        for token, number in kind.words.items():
            if tokens.get(token, number) != number:
                return f"the tokenizer in {folder} is not {kind.title}'s: {token} is its token {tokens[token]:,}, in the text encoder it is {number:,}"
    return None


def _tokens(folder: Path) -> dict[str, int]:
    """Token → id, added ones included. Raises `ModelProblem`."""
    try:
        if (folder / "tokenizer.json").is_file():
            content = read_json(folder / "tokenizer.json")
            vocabulary = content["model"]["vocab"]
            found = (
                dict(vocabulary)
                if isinstance(vocabulary, dict)
                else {entry[0]: index for index, entry in enumerate(vocabulary)}
            )
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
