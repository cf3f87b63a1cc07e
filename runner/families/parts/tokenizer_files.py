"""Finds the folder of a text encoder's tokenizer; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from runner.families.locate import KeyPath, locate_model
from runner.families.parts.files import BUILTIN, CHECKPOINT
from runner.model.model import ModelProblem
from schemas import RunConfig

_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def find_tokenizer(config: RunConfig, folder: Path, place: Path, number: int) -> Path | None:
    """The folder of the tokenizer of text encoder `number`: what run.toml names, else the checkpoint's own, else None."""
    key: KeyPath = ("model", f"tokenizer_{number}")
    given = getattr(config.model, f"tokenizer_{number}")
    if given is not None:
        found = locate_model(given, folder, None, BUILTIN, key)
        if not tokenizer_files(found):
            raise ModelProblem(
                key, f"{found} is no tokenizer: it needs tokenizer.json, spiece.model, or vocab.json and merges.txt"
            )
        return found
    name = "tokenizer" if number == 1 else f"tokenizer_{number}"
    beside = getattr(config.model, f"text_encoder_{number}")
    places = [locate_model(beside, folder, None, BUILTIN, key)] if beside is not None else []
    for candidate in (*places, *(entry.parent for entry in places), place):
        own = candidate / name
        if candidate.is_dir() and tokenizer_files(own):
            return own
    return None


def need_t5(config: RunConfig, places: Mapping[str, Path | None], number: int) -> None:
    """Raises `ModelProblem` where T5 is text encoder `number` and its tokenizer was not found: none is built in."""
    if places[f"text_encoder_{number}"] is None:
        key = f"tokenizer_{number}"
        raise ModelProblem(
            ("model", key) if getattr(config.model, key) else CHECKPOINT,
            "the T5 text encoder needs its tokenizer, which no single file holds",
            f"name its folder (tokenizer.json or spiece.model) with model.{key}",
        )


def tokenizer_files(folder: Path | None) -> tuple[Path, ...]:
    """The files that decide what a tokenizer does; empty where there is none."""
    if folder is None or not folder.is_dir():
        return ()
    found = tuple(folder / name for name in _TOKENIZER_FILES if (folder / name).is_file())
    given = {file.name for file in found}
    complete = given & {"tokenizer.json", "spiece.model"} or {"vocab.json", "merges.txt"} <= given
    return found if complete else ()
