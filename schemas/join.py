"""The whole of run.toml with the families of this installation: their names, and the parts that only they have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, Literal, TypeVar

from pydantic import create_model

from schemas.base import Section
from schemas.config import RunConfig
from schemas.dataset import Dataset, HeldOut, Source
from schemas.model import Model
from schemas.sampling import Prompt, Sampling

Parts = Sequence[type[Section]]
Base = TypeVar("Base", bound=Section)


def joined(
    families: Sequence[str], variants: Sequence[str] = (), model: Parts = (), source: Parts = (), prompt: Parts = ()
) -> type[RunConfig]:
    """`RunConfig` for these families, with more variants, and with the keys of these parts in [model], in sources and in
    prompts."""
    own: dict[str, Any] = {"family": Literal[tuple(families)]}
    if variants:
        own["variant"] = Model.model_fields["variant"].annotation | Literal[tuple(variants)]
    changes: dict[str, Any] = {"model": _with(Model, model, own)}
    if source:
        sources = {"sources": list[_with(Source, source)], "held_out": _with(HeldOut, source) | None}  # type: ignore[misc]
        changes["dataset"] = _with(Dataset, (), sources)
    if prompt:
        changes["sampling"] = _with(Sampling, prompt, {"prompts": list[_with(Prompt, prompt)]})  # type: ignore[misc]
    return _with(RunConfig, (), changes)


def _with(base: type[Base], parts: Parts, annotations: Mapping[str, Any] | None = None) -> type[Base]:
    """A section of the same name with more bases, and with some of its keys of another type."""
    fields: dict[str, Any] = {}
    for name, annotation in (annotations or {}).items():
        field = copy(base.model_fields[name])
        field.annotation = annotation
        if field.default_factory is base.model_fields[name].annotation:  # a section that need not be there
            field.default_factory = annotation
        fields[name] = (annotation, field)
    bases: Any = (*(part for part in parts if not issubclass(base, part)), base)
    found: type[Base] = create_model(
        base.__name__, __base__=bases, __module__=base.__module__, __doc__=base.__doc__, **fields
    )
    return found
