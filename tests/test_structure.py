"""What the code looks like: rules that no linter knows."""

from __future__ import annotations

import ast
from pathlib import Path

import tomli

from tests.support import ROOT

FOLDERS = ("runner", "schemas", "tools", "benchmarks", "tests")
MOST_POSITIONAL = 4
"""Fields of a dataclass that may be given by their place."""


def test_the_formatter_has_the_last_word() -> None:
    mark = "# fmt:" + " "
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    assert [file for file in files if mark in file.read_text(encoding="utf-8")] == []


def test_large_dataclasses_take_keywords_only() -> None:
    found = []
    for file in sorted((ROOT / "runner").rglob("*.py")):
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        found += [f"{file}: {node.name}" for node in nodes if isinstance(node, ast.ClassDef) and takes_places(node)]
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


def test_the_readmes_tree_is_that_of_the_contract() -> None:
    lines = (
        (ROOT / "README.md").read_text(encoding="utf-8").split("    runner/ ")[1].split("    recipes/")[0].splitlines()
    )
    named = [
        word.rstrip("/") for line in lines for word in line[6:24].split() if line[:6] == " " * 6 and word.endswith("/")
    ]
    contract = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    layers = next(entry["layers"] for entry in contract if entry["type"] == "layers")
    packages = [name for name in layers if (ROOT / "runner" / name).is_dir()]
    assert named == packages
