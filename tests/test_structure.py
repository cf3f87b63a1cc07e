"""What the code looks like: rules that no linter knows."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.support import ROOT

FOLDERS = ("runner", "schemas", "tools", "benchmarks", "tests")
MOST_POSITIONAL = 4
"""Fields of a dataclass that may be given by their place."""


def trees() -> Iterator[tuple[str, str, ast.Module]]:
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            text = file.read_text(encoding="utf-8")
            yield file.relative_to(ROOT).as_posix(), text, ast.parse(text)


def test_the_formatter_has_the_last_word() -> None:
    mark = "# fmt:" + " "
    assert [name for name, text, _ in trees() if mark in text] == []


def test_large_dataclasses_take_keywords_only() -> None:
    found = [
        f"{name}: {node.name}"
        for name, _, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and name.startswith("runner/") and takes_places(node)
    ]
    assert found == []


def takes_places(node: ast.ClassDef) -> bool:
    """Whether it is a dataclass of more than four fields that may be given by their place."""
    calls = [mark for mark in node.decorator_list if getattr(getattr(mark, "func", mark), "id", "") == "dataclass"]
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign) and "init=False" not in ast.unparse(part)]
    keywords = {word.arg for mark in calls if isinstance(mark, ast.Call) for word in mark.keywords}
    return bool(calls) and len(fields) > MOST_POSITIONAL and "kw_only" not in keywords


def test_every_recipe_is_shipped() -> None:
    shipped = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    recipes = [file.parent.name for file in Path(ROOT / "recipes").glob("*/run.toml")]
    assert [name for name in recipes if f'"recipes/{name}' not in shipped] == []
