"""What decides a stage's result, as a tree of facts, each with the keys of run.toml that it comes from; torch-free.

The fingerprint hashes the tree's values; the reason for an action is the difference between two trees (plan/reasons.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from runner.identity import fingerprint


@dataclass(frozen=True)
class KnownAfter:
    """Stands for a value that a stage finds out."""

    stage: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Fact:
    """A leaf of the tree."""

    value: Any
    origin: tuple[str, ...] = ()
    """Keys of run.toml: one key, a table with all of its keys, or `table.**.name` for the keys of that name below a table."""
    content: str | None = None
    """The value is a digest of files, which the first given key of `origin` names: what they are called, or "" where the key
    says it all."""
    hashed: bool = True
    """False: it decides whether there is something to do, not what comes of it."""
    files: str | None = None
    """The value comes from files of the items, which are named one by one: what one is called."""


Tree = Mapping[str, "Fact | Tree"]


def said(value: Any, *origin: str) -> Fact:
    """A value that run.toml says, or that is derived from what it says."""
    return Fact(value=value, origin=origin)


def content(digest: Any, *keys: str, label: str = "") -> Fact:
    """The digest of files that a key names: the first of `keys` that is given."""
    return Fact(value=digest, origin=keys, content=label)


def section(model: BaseModel | None, path: str) -> Fact | Tree:
    """A table of run.toml, a fact for each of its keys; one for a table that is not there."""
    if model is None:
        return said(None, path)
    found: dict[str, Fact | Tree] = {}
    for name in type(model).model_fields:
        value = getattr(model, name)
        here = f"{path}.{name}"
        found[name] = section(value, here) if isinstance(value, BaseModel) else said(value, here)
    return found


def values(tree: Fact | Tree) -> Any:
    """What the fingerprint hashes."""
    if isinstance(tree, Fact):
        return tree.value
    return {name: values(part) for name, part in tree.items() if not isinstance(part, Fact) or part.hashed}


def leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Fact]]:
    """(dotted name, fact) of each leaf."""
    for name, part in tree.items():
        if isinstance(part, Fact):
            yield prefix + name, part
        else:
            yield from leaves(part, f"{prefix}{name}.")


def digests(tree: Tree) -> dict[str, str]:
    """Leaf → a short digest of its value, for the record of an apply."""
    return {name: digest(fact) for name, fact in leaves(tree)}


def digest(fact: Fact) -> str:
    return "" if isinstance(fact.value, KnownAfter) else fingerprint(fact.value)[:12]


def unknown(tree: Fact | Tree) -> str | None:
    """The stage before which not all of the tree is known."""
    if isinstance(tree, Fact):
        return tree.value.stage if isinstance(tree.value, KnownAfter) else None
    return next((stage for part in tree.values() if (stage := unknown(part)) is not None), None)
