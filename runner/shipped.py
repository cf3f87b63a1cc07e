"""Finds templates/ and recipes/: inside an installed wheel, or beside the packages in an editable checkout."""

from __future__ import annotations

from pathlib import Path


def shipped(name: str) -> Path:
    """The folder `templates` or `recipes`. A wheel holds them under runner/_shipped; an editable install has none there."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "_shipped" / name, package.parent / name):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"{name} is not part of this installation of runner")
