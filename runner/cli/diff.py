"""runner diff."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from runner.cli import out
from runner.cli.common import json_option
from runner.errors import Exit, Invalid


@click.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@json_option
def command(first: Path, second: Path, as_json: bool) -> int:
    """Compare the configurations of two runs: run.toml files, runs' folders, or their resolved.json."""
    from runner.config.schema import all_keys
    from runner.plan.history import schema_path

    one, two = _configuration(first), _configuration(second)
    rows = []
    for path in sorted(set(one) | set(two)):
        if one.get(path) != two.get(path):
            key = all_keys().get(schema_path(path)) or all_keys().get(schema_path(path).rpartition(".")[0])
            rows.append(
                {"key": path, "first": one.get(path), "second": two.get(path), "effect": key.effect if key else "none"}
            )
    if as_json:
        out.record(rows)
        return Exit.DONE
    if not rows:
        out.say("the configurations are equal")
    for row in rows:
        effect = {"trajectory": "other results", "bits": "other bytes", "none": "same results"}[str(row["effect"])]
        out.data(f"{row['key']}  {_shown(row['first'])} → {_shown(row['second'])}  ({effect})")
    return Exit.DONE


def _configuration(place: Path) -> dict[str, Any]:
    """Dotted path → value: resolved where the run's folder says it, else as the file and its defaults say."""
    from runner.config.load import load
    from runner.config.schema import everything
    from runner.plan.history import flat_config

    file = place / "resolved.json" if place.is_dir() else place
    if file.suffix == ".json":
        try:
            return flat_config(everything().model_validate(json.loads(file.read_text(encoding="utf-8"))))
        except (OSError, ValueError) as error:
            raise Invalid(f"{file} cannot be read: {error}", hint="name a run.toml or a run's folder") from None
    return flat_config(load(file).require())


def _shown(value: Any) -> str:
    return "unset" if value is None else json.dumps(value, ensure_ascii=False)
