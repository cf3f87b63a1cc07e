"""plan.json: a plan that was looked at, to be applied exactly so or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.atomic import write_json
from runner.errors import Invalid
from runner.files import MOST_JSON_BYTES, name_problem, parsing, read_bytes
from runner.plan.diff import Plan
from runner.plan.render import PLAN_VERSION
from runner.plan.stages.registry import targets


@dataclass(frozen=True)
class PlanFile:
    """What a plan.json holds: the file, its settings, the target, and each stage's fingerprint and action."""

    run_file: Path
    settings: tuple[str, ...]
    target: str | None
    record: dict[str, Any]


def write_plan_file(
    file: Path, run_file: Path, settings: tuple[str, ...], target: str | None, record: dict[str, Any]
) -> None:
    """Writes a plan; the run's file is named relative to it where it can be."""
    write_json(file, {**record, "file": str(run_file.absolute()), "settings": list(settings), "target": target})


def read_plan_file(file: Path) -> PlanFile:
    """Raises `Invalid`."""
    try:
        raw = read_bytes(file, MOST_JSON_BYTES)
    except OSError as error:
        raise Invalid(f"{file} cannot be read: {error.strerror}") from None

    def no_plan(reason: str) -> Invalid:
        return Invalid(f"{file} is no plan ({reason})", hint="make one: runner plan run.toml --out plan.json")

    with parsing(no_plan):
        content = json.loads(raw)
    if not isinstance(content, dict):
        raise no_plan("it holds no table")
    version = content.get("version")
    if type(version) is int and version > PLAN_VERSION:
        raise Invalid(f"{file} was written by a newer runner (plan version {version})", hint="update runner")
    missing = [name for name, fits in _SHAPES.items() if not fits(content.get(name))]
    if missing:
        raise no_plan(f"`{missing[0]}` is missing or of another kind")
    return PlanFile(Path(content["file"]), tuple(content["settings"]), content["target"], content)


def _are_texts(value: Any, names: tuple[str, ...] | None = None) -> bool:
    """Whether a value is a list of texts; with names, a list of tables with texts of these names."""
    if not isinstance(value, list):
        return False
    if names is None:
        return all(isinstance(item, str) for item in value)
    return all(isinstance(item, dict) and all(isinstance(item.get(name), str) for name in names) for item in value)


_SHAPES: dict[str, Callable[[Any], bool]] = {
    "version": lambda value: type(value) is int,
    "file": lambda value: isinstance(value, str) and name_problem(value) is None,
    "settings": _are_texts,
    "target": lambda value: value is None or value in targets(),
    "actions": lambda value: _are_texts(value, ("stage", "fingerprint", "symbol")),
}
"""What is read of a plan, and its shape."""


def check_current(saved: PlanFile, plan: Plan) -> None:
    """Raises `Invalid` where the plan would be another one now."""
    now = {action.node: (plan.graph.fingerprint(action.node), action.symbol) for action in plan.actions.values()}
    then = {entry["stage"]: (entry["fingerprint"], entry["symbol"]) for entry in saved.record["actions"]}
    for stage, value in now.items():
        if then.get(stage) != value:
            what = "its inputs changed" if then.get(stage, ("",))[0] != value[0] else "what it has to do changed"
            raise Invalid(
                f"the plan is stale: {stage}: {what} since it was made", hint="look at a new one: runner plan"
            )
