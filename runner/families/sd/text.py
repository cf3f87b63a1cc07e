"""Text for the U-Net: tokens in pieces, CLIP's hidden states, and (where asked for) weighted words."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from runner.errors import RunFailed
from runner.families.contract import Conditioning
from runner.families.sd.weighting import parse_weights
from runner.families.spec import Model
from runner.inputs import Numerics

_BPE_FILE = Path(__file__).parent / "configs" / "clip_tokenizer" / "bpe_simple_vocab_16e6.txt.gz"
_CLIP_SIZE = 49408
_PIECE = 75
"""Tokens that max_token_length counts in; an encoder with fewer positions has smaller pieces."""


@cache
def _builtin_clip() -> CLIPTokenizer:
    """CLIP's tokenizer from its merges file (MIT licence, see NOTICE); the construction is that of openai/CLIP."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    lines = gzip.decompress(_BPE_FILE.read_bytes()).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    letters = list(bytes_to_unicode().values())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def load_tokenizer(model: Model) -> CLIPTokenizer:
    """The checkpoint's tokenizer, else the built-in one; its size must be that of the text encoder. Raises `RunFailed`."""
    if model.tokenizer is None:
        tokenizer = _builtin_clip()
    else:
        tokenizer = CLIPTokenizer.from_pretrained(model.tokenizer, local_files_only=True)
    wanted = model.components["text_encoder_1"].config["vocab_size"]
    if len(tokenizer) != wanted:
        raise RunFailed(
            f"the tokenizer in {model.tokenizer or 'this program'} has {len(tokenizer)} tokens, the text encoder {wanted}",
            hint="name the folder of the right one with model.tokenizer_1",
        )
    return tokenizer


def encode_texts(
    encoder: Any, tokenizer: Any, texts: Sequence[str], numerics: Numerics, weighting: bool
) -> Conditioning:
    """{"hidden": [B, L, D]}. L is the encoder's length for max_token_length 75; longer texts are encoded in pieces and
    joined without the inner ends, as Kohya's tools do. clip_skip takes hidden states from before the last layers and
    applies the final norm to them."""
    length = encoder.config.max_position_embeddings
    pieces = numerics.max_token_length // _PIECE
    rows = [_tokens(tokenizer, text, (length - 2) * pieces, weighting) for text in texts]
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    pad = tokenizer.pad_token_id
    ids = torch.tensor([_cut(row, length, pieces, begin, end, pad) for row, _ in rows])  # [B, pieces, length]
    device = next(encoder.parameters()).device
    hidden = _hidden(encoder, ids.flatten(0, 1).to(device), numerics.clip_skip).unflatten(0, ids.shape[:2])
    joined = _joined(hidden)
    if weighting:
        joined = _weighted(joined, [weights for _, weights in rows], length, pieces)
    return {"hidden": joined}


def _tokens(tokenizer: Any, text: str, room: int, weighting: bool) -> tuple[list[int], list[float]]:
    """The token ids without ends, cut to the room there is, and a weight for each."""
    ids: list[int] = []
    weights: list[float] = []
    for part, weight in parse_weights(text) if weighting else [(text, 1.0)]:
        found = tokenizer(part, add_special_tokens=False).input_ids
        ids += found
        weights += [weight] * len(found)
    return ids[:room], weights[:room]


def _cut(row: list[int], length: int, pieces: int, begin: int, end: int, pad: int) -> list[list[int]]:
    cut = []
    for index in range(pieces):
        part = row[index * (length - 2) : (index + 1) * (length - 2)]
        padding = length - 2 - len(part)
        cut.append([begin, *part, end, *[pad] * padding])
    return cut


def _hidden(encoder: Any, ids: Tensor, clip_skip: int) -> Tensor:
    if clip_skip <= 1:
        return encoder(ids).last_hidden_state
    states = encoder(ids, output_hidden_states=True).hidden_states
    return encoder.final_layer_norm(states[-clip_skip])


def _joined(hidden: Tensor) -> Tensor:
    """[B, pieces, length, D] → [B, 2 + pieces * (length - 2), D]: the first begin, all inner tokens, the last end."""
    if hidden.shape[1] == 1:
        return hidden[:, 0]
    inner = hidden[:, :, 1:-1].flatten(1, 2)
    return torch.cat([hidden[:, 0, :1], inner, hidden[:, -1, -1:]], dim=1)


def _weighted(hidden: Tensor, weights: list[list[float]], length: int, pieces: int) -> Tensor:
    """Scales each token's state by its weight and restores the text's mean, as AUTOMATIC1111's web UI does."""
    room = (length - 2) * pieces
    factors = torch.tensor([[1.0, *row, *[1.0] * (room - len(row)), 1.0] for row in weights], device=hidden.device)
    before = hidden.float().mean(dim=(1, 2), keepdim=True)
    scaled = hidden.float() * factors[:, :, None]
    after = scaled.mean(dim=(1, 2), keepdim=True)
    return (scaled * (before / after)).to(hidden.dtype)
