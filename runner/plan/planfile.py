"""plan.json: a plan that was looked at, to be applied exactly so or not at all."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.atomic import write_json
from runner.errors import Invalid
from runner.plan.diff import Plan
from runner.plan.render import PLAN_VERSION


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
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content["version"]
        if not isinstance(version, int) or version > PLAN_VERSION:
            raise Invalid(f"{file} was written by a newer runner (plan version {version})", hint="update runner")
        return PlanFile(Path(content["file"]), tuple(content["settings"]), content["target"], content)
    except OSError as error:
        raise Invalid(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise Invalid(f"{file} is no plan", hint="make one: runner plan run.toml --out plan.json") from None


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
