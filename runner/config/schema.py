"""The schema of run.toml as this installation has it: with the names and the keys of its families; torch-free.

The built-in families' keys are in schemas/ already. Those of other packages are joined where a file names such a family, or
where everything is listed.
"""

from __future__ import annotations

from runner.registry import FAMILIES, installed, named
from schemas import RunConfig
from schemas.base import Section
from schemas.dataset import Source
from schemas.join import joined
from schemas.model import Model
from schemas.sampling import Prompt
from schemas.walk import Key, section_of
from schemas.walk import all_keys as keys_of

_known: dict[str, type[RunConfig]] = {}


def run_config(family: object = None) -> type[RunConfig]:
    """The class of a whole run.toml of a family. One that is not built in has the others' keys joined, from now on."""
    if "all" in _known:
        return _known["all"]
    if isinstance(family, str) and family not in FAMILIES and family in installed():
        return everything()
    if "built in" not in _known:
        _known["built in"] = joined(list(FAMILIES))
    return _known["built in"]


def everything() -> type[RunConfig]:
    """The same with the keys of every installed family."""
    if "all" not in _known:
        others = [named(name) for name in installed() if name not in FAMILIES]
        model, source, prompt = (
            list(dict.fromkeys(part for spec in others for part in parts(spec)))
            for parts in (lambda s: s.model_parts, lambda s: s.source_parts, lambda s: s.prompt_parts)
        )
        variants = [name for spec in others for name in spec.variants]
        _known["all"] = joined(list(installed()), variants, model, source, prompt)
    return _known["all"]


def prompt_class() -> type[Prompt]:
    """The class of [[sampling.prompts]]."""
    found: type[Section] = run_config()
    for name in ("sampling", "prompts"):
        found = section_of(found.model_fields[name].annotation) or found
    assert issubclass(found, Prompt)
    return found


def model_class() -> type[Model]:
    """The class of [model]."""
    found = section_of(run_config().model_fields["model"].annotation)
    assert found is not None
    assert issubclass(found, Model)
    return found


def source_class() -> type[Source]:
    """The class of [[dataset.sources]]."""
    found: type[Section] = run_config()
    for name in ("dataset", "sources"):
        found = section_of(found.model_fields[name].annotation) or found
    assert issubclass(found, Source)
    return found


def all_keys() -> dict[str, Key]:
    """Every key and every section by its dotted path, in the order of the schema."""
    return keys_of(run_config())


def leaf_keys() -> list[Key]:
    """The keys that hold a value, not a table."""
    return [key for key in all_keys().values() if key.section is None]
