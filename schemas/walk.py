"""Reads the schema itself: every key with its type, default, effect and documentation.

The command `explain`, the error hints, docs/run_toml.md, the templates and the generated test all go through `all_keys`.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from schemas.base import Section
from schemas.config import RunConfig


@dataclass(frozen=True)
class Key:
    """One key of run.toml. `path` has no list indexes; `array` tells whether its table is an array of tables."""

    path: tuple[str, ...]
    field: FieldInfo
    owner: type[Section]
    array: bool

    @property
    def dotted(self) -> str:
        return ".".join(self.path)

    @property
    def section(self) -> type[Section] | None:
        """The section's class where this key is a table."""
        return section_of(self.field.annotation)

    @property
    def is_array_of_tables(self) -> bool:
        return self.section is not None and _list_item(self.field.annotation) is not None

    @property
    def effect(self) -> str:
        return str(self._extra("x-effect"))

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(self._extra("x-stages"))

    def _extra(self, name: str) -> Any:
        extra = self.field.json_schema_extra
        assert isinstance(extra, dict), f"{self.dotted} was not declared with key()"
        return extra[name]

    @property
    def required(self) -> bool:
        return self.field.is_required()

    @property
    def default(self) -> Any:
        """The default as run.toml would hold it; None where it is derived or unset."""
        return self.field.get_default(call_default_factory=True) if not self.required else None

    @property
    def documentation(self) -> str:
        return docstrings(self.owner)[self.path[-1]]

    @property
    def type_text(self) -> str:
        return describe(self.field.annotation, self.field.metadata)


@cache
def all_keys(root: type[RunConfig] = RunConfig) -> dict[str, Key]:
    """Every key and every section by its dotted path, in the order of the schema."""
    return {key.dotted: key for key in _walk(root, (), False)}


def _walk(model: type[Section], prefix: tuple[str, ...], array: bool) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        key = Key((*prefix, name), field, model, array)
        yield key
        if key.section is not None:
            yield from _walk(key.section, key.path, key.is_array_of_tables)


def section_of(annotation: Any) -> type[Section] | None:
    """The section's class in `X`, `X | None` or `list[X]`."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, Section):
            return part
    return None


def _list_item(annotation: Any) -> Any:
    for part in (annotation, *get_args(annotation)):
        if get_origin(part) is list:
            return get_args(part)[0]
    return None


@cache
def docstrings(model: type[Section]) -> dict[str, str]:
    """The strings that stand under the fields of a section and its bases, read from the source."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if not (isinstance(base, type) and issubclass(base, Section)) or base is Section:
            continue
        tree = ast.parse(inspect.getsource(sys.modules[base.__module__]))
        body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == base.__name__)
        for statement, following in itertools.pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                assert isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant), (
                    f"{base.__name__}.{statement.target.id} has no docstring"
                )
                found[statement.target.id] = str(following.value.value)
    return found


def describe(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    """A type in words: `an integer of at least 1`, `"best" | "last"`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extra = get_args(annotation)
        return describe(inner, [*extra, *metadata])
    if origin in (Union, types.UnionType):
        parts = [describe(part, metadata) for part in get_args(annotation) if part is not type(None)]
        return " or ".join(dict.fromkeys(parts))
    if origin is Literal:
        return " | ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in get_args(annotation))
    if origin is list:
        found = _found_limits(metadata)
        items = _plural(describe(get_args(annotation)[0]))
        if "min_length" in found and found["min_length"] == found.get("max_length"):
            return f"a list of {found['min_length']} {items}"
        return f"a list of {items}"
    if origin is dict:
        return f"a table of names with {describe(get_args(annotation)[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "a table"
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text", Any: "any value"}
    return words[annotation] + _limits(metadata)


def _plural(text: str) -> str:
    for one, many in (("an integer", "integers"), ("a number", "numbers"), ("text", "texts"), ("a table", "tables")):
        if text.startswith(one):
            return many + text[len(one) :]
    return text


def _limits(metadata: list[Any] | tuple[Any, ...]) -> str:
    found = _found_limits(metadata)
    if "ge" in found and "le" in found:
        return f" from {_number(found['ge'])} to {_number(found['le'])}"
    words = {"ge": "of at least {}", "gt": "above {}", "le": "of at most {}", "lt": "below {}"}
    text = " and ".join(words[name].format(_number(value)) for name, value in found.items() if name in words)
    return f" {text}" if text else ""


def _number(value: float) -> str:
    """Large whole numbers in groups of three digits."""
    return f"{value:,}" if isinstance(value, int) and value >= 100_000 else str(value)


def _found_limits(metadata: list[Any] | tuple[Any, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in metadata:
        for candidate in getattr(item, "metadata", None) or [item]:
            for name in ("ge", "gt", "le", "lt", "min_length", "max_length"):
                value = getattr(candidate, name, None)
                if value is not None:
                    found[name] = value
    return found
