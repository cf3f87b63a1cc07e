"""The families by name. Importing a spec imports no torch; importing a family does."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING

from runner.families.spec import FamilySpec
from runner.registry import FAMILIES, installed, named

if TYPE_CHECKING:
    from runner.families.contract import Family

__all__ = ["FAMILIES", "family", "family_spec", "installed"]


def family_spec(name: str) -> FamilySpec:
    """The torch-free half."""
    spec = named(name)
    assert isinstance(spec, FamilySpec)
    return spec


def family(name: str) -> Family:
    """The half with torch."""
    bundle: Family = resolve_name(family_spec(name).implementation)
    return bundle
