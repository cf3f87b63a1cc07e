"""Counts the tokens of captions without torch, with the tokenizers that training uses."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runner.families.parts.files import CONFIGS
from runner.families.parts.tokenizer_fit import sentence_pieces
from runner.files import MOST_JSON_BYTES, parsing, read_bytes
from runner.model.model import SPIECE, Model

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BPE_FILE = CONFIGS / "clip_tokenizer" / "bpe_simple_vocab_16e6.txt.gz"
_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
"""CLIP's words, as transformers' CLIPTokenizer splits them."""


class NoTokenizer(Exception):
    """A tokenizer that cannot be read here."""


def clip_merges() -> list[tuple[str, str]]:
    """The merges of CLIP's tokenizer (MIT licence, see NOTICE), as openai/CLIP takes them from its file."""
    lines = gzip.decompress(_BPE_FILE.read_bytes()).decode("utf-8").split("\n")
    pairs = (line.split() for line in lines[1 : 49152 - 256 - 2 + 1])
    return [(first, second) for first, second in pairs]


def tokenizer_file(model: Model, encoder: str) -> Path | None:
    """The file that decides an encoder's tokens; None is the built-in tokenizer of CLIP. Raises `NoTokenizer`."""
    folder = model.tokenizers[encoder]
    if folder is None:
        return None
    kind = model.components[encoder].tokenizer
    for name in ("tokenizer.json", kind.alone) if kind is not None else ():
        if (folder / name).is_file():
            return folder / name
    raise NoTokenizer(str(folder))


def count_tokens(file: Path | None, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, without those that an encoder puts around it. Raises `NoTokenizer`."""
    if file is not None and file.name == SPIECE:
        with parsing(NoTokenizer):
            return [len(ids) for ids in sentence_pieces(file).encode(list(texts))]
    tokenizer = _load(file)
    return [len(found.ids) for found in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def _load(file: Path | None) -> Tokenizer:
    if file is None:
        return _clip(clip_merges())
    try:
        text = read_bytes(file, MOST_JSON_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise NoTokenizer(str(error)) from None
    if file.name != "merges.txt":
        with parsing(NoTokenizer):
            json.loads(text)  # the library's own reader ends the program on some files
    try:
        return _of_merges(text) if file.name == "merges.txt" else _of_json(text)
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
        raise NoTokenizer(str(error)) from None


def _of_merges(text: str) -> Tokenizer:
    pairs = (line.split() for line in text.splitlines() if not line.startswith("#version"))
    return _clip([(pair[0], pair[1]) for pair in pairs if len(pair) == 2])


def _of_json(text: str) -> Tokenizer:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _clip(merges: list[tuple[str, str]]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = [*letters, *(f"{letter}</w>" for letter in letters), *(first + second for first, second in merges)]
    vocabulary = {token: number for number, token in enumerate([*known, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = Tokenizer(
        BPE(vocabulary, merges, end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token="<|endoftext|>")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer
