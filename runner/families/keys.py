"""Whose the keys are that only some families have; torch-free. Nothing is listed by hand: families say their parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from runner.config.schema import model_class, prompt_class, source_class
from runner.families.registry import family_spec, installed
from runner.families.spec import FamilySpec
from schemas.base import Section
from schemas.dataset import CommonSource
from schemas.model import CommonModel
from schemas.sampling import CommonOptions, Prompt, PromptOptions


def foreign_prompt_keys(spec: FamilySpec) -> list[str]:
    """The keys of prompts that a family has not, in the order of the schema."""
    own = set(Prompt.model_fields) - set(PromptOptions.model_fields)
    return [key for key in _others(prompt_class(), (CommonOptions, *spec.prompt_parts)) if key not in own]


def foreign_model_keys(spec: FamilySpec) -> list[str]:
    """The keys of [model] that a family has not."""
    return _others(model_class(), (CommonModel, *spec.model_parts))


def foreign_source_keys(spec: FamilySpec) -> list[str]:
    """The keys of sources that a family has not."""
    return _others(source_class(), (CommonSource, *spec.source_parts))


def whose_source_key(key: str) -> str:
    """The families that have a key of sources, in words."""
    return _listed(spec.title for spec in _specs() if key not in foreign_source_keys(spec))


def whose_prompt_key(key: str) -> str:
    """The families that have a key of prompts, in words."""
    return _listed(spec.title for spec in _specs() if key not in foreign_prompt_keys(spec))


def whose_model_key(key: str) -> str:
    """The families that have a key of [model], in words."""
    return _listed(spec.title for spec in _specs() if key not in foreign_model_keys(spec))


def is_for_videos(key: str) -> bool:
    """Whether only families that make videos have a key of prompts."""
    return all(spec.clips is not None for spec in _specs() if key not in foreign_prompt_keys(spec))


def takes_controls() -> list[str]:
    """Which runs take control images."""
    return [spec.controls for spec in _specs() if spec.controls]


def _specs() -> Iterator[FamilySpec]:
    return (family_spec(name) for name in installed())


def _others(whole: type[Section], own: Iterable[type[Section]]) -> list[str]:
    known = {name for part in own for name in part.model_fields}
    return [name for name in whole.model_fields if name not in known]


def _listed(titles: Iterable[str]) -> str:
    *others, last = titles
    return f"{', '.join(others)} and {last}" if others else last
