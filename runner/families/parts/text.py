"""Text for denoisers: tokens in pieces, CLIP's and T5's hidden states, and (where asked for) weighted words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPTokenizer

from runner.errors import RunFailed
from runner.families.parts.tokenizer_kinds import TEXT
from runner.families.parts.weighting import parse_weights
from runner.families.token_counts import clip_merges
from runner.files import reason
from runner.model.model import Model

PIECE = 75
"""Tokens that max_token_length counts in; an encoder with fewer positions has smaller pieces."""


@cache
def _builtin_clip(pad: str) -> CLIPTokenizer:
    """CLIP's tokenizer; the construction is that of openai/CLIP."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    merges = clip_merges()
    letters = list(bytes_to_unicode().values())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, pad_token=pad)


def load_tokenizers(model: Model, pads: Mapping[str, str]) -> dict[str, Any]:
    """Text encoder → tokenizer: the checkpoint's, else the built-in one of CLIP, which then pads with `pads`.

    Its size must be that of the text encoder. Raises `RunFailed`.
    """
    return {name: _load_tokenizer(model, name, pads.get(name, "<|endoftext|>")) for name in model.text_encoders}


def load_clip(folder: Path) -> Any:
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def load_any(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _load_tokenizer(model: Model, name: str, pad: str) -> Any:
    folder, kind = model.tokenizers[name], model.components[name].tokenizer
    assert kind is not None
    try:
        tokenizer = _builtin_clip(pad) if folder is None else resolve_name(kind.load)(folder)
        ids = tuple(tokenizer(TEXT).input_ids)
    except Exception as error:  # noqa: BLE001 - the libraries raise whatever a damaged file makes of them
        raise RunFailed(
            f"the tokenizer in {folder or 'this program'} cannot be loaded: {reason(error)}",
            hint="copy or download its folder again",
        ) from None
    wanted, problem = kind.size, None
    if not wanted - kind.spare <= len(tokenizer) <= wanted:
        problem = f"has {len(tokenizer):,} tokens, the text encoder {wanted:,}"
    elif 0 < kind.vocabulary <= wanted and set(kind.words) <= tokenizer.get_vocab().keys() and ids != kind.encoding:
        problem = f'makes {list(ids)} of "{TEXT}", {kind.title}\'s makes {list(kind.encoding)}'
    if problem is not None:
        raise RunFailed(
            f"the tokenizer in {folder or 'this program'} {problem}",
            hint=f"name the folder of the right one with model.tokenizer_{name[-1]}",
        )
    return tokenizer


@dataclass(frozen=True)
class ClipText:
    """`hidden` [B, L, D] and, of an encoder with a projection, `pooled` [B, P]."""

    hidden: Tensor
    pooled: Tensor | None


def encode_clip(
    encoder: Any, tokenizer: Any, texts: Sequence[str], pieces: int, skip: int, normed: bool, weighting: bool
) -> ClipText:
    """L is the encoder's length; longer texts are encoded in `pieces` and joined without the inner ends, as Kohya's
    tools do. The hidden states are those `skip` layers from the end (1: the last), `normed`: with the final norm on.
    Pooled embeddings come from the first piece."""
    length = encoder.config.max_position_embeddings
    rows = [_tokens(tokenizer, text, (length - 2) * pieces, weighting) for text in texts]
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = torch.tensor([_cut(row, length, pieces, begin, end, pad) for row, _ in rows])  # [B, pieces, length]
    device = next(encoder.parameters()).device
    flat = ids.flatten(0, 1).to(device)
    pooled = None
    if skip <= 1 and normed:
        hidden = encoder(flat).last_hidden_state
    else:
        output = encoder(flat, output_hidden_states=True)
        hidden = output.hidden_states[-skip]
        hidden = encoder.final_layer_norm(hidden) if normed else hidden
        if "text_embeds" in output:
            pooled = output.text_embeds.unflatten(0, ids.shape[:2])[:, 0]
    joined = _joined(hidden.unflatten(0, ids.shape[:2]))
    if weighting:
        joined = _weighted(joined, [weights for _, weights in rows], length, pieces)
    return ClipText(joined, pooled)


def pooled_clip(encoder: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """[B, P] of a CLIPTextModel: the last layer's state at the end of each text, which is cut to the encoder's length."""
    ids = tokenizer(
        list(texts),
        padding="max_length",
        max_length=encoder.config.max_position_embeddings,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    pooled: Tensor = encoder(ids.to(next(encoder.parameters()).device)).pooler_output
    return pooled


def encode_t5(encoder: Any, tokenizer: Any, texts: Sequence[str], length: int, weighting: bool) -> Tensor:
    """[B, length, D]. Padded to the length, without a mask, as SD3 was trained; weights in the text are left out."""
    plain = ["".join(part for part, _ in parse_weights(text)) if weighting else text for text in texts]
    ids = tokenizer(plain, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    hidden: Tensor = encoder(ids.to(next(encoder.parameters()).device))[0]
    return hidden


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
