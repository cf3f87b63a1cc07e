"""What a run's folder last applied, for the verbs that work on it: with the --set of that apply, or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runner.cli import out
from runner.cli.common import prepared_run, store_of
from runner.errors import Invalid

if TYPE_CHECKING:
    from runner.plan.history import Applied
    from runner.plan.prepare import Prepared
    from runner.plan.stage import Inputs
    from runner.store.store import Store

_AS_APPLIED = 3
"""So many keys are offered as --set to get back at what was applied."""


def run_of(file: Path, settings: tuple[str, ...]) -> tuple[Store, Path, str]:
    """The store, folder and name of a run. Raises `InvalidConfig` where run.toml does not say them."""
    from runner.config.load import load
    from runner.files import resolve_path

    loaded = load(file, settings)
    name, given = (loaded.source.value(("run", key)) for key in ("name", "output_dir"))
    if not isinstance(name, str) or not isinstance(given, str | None):
        run = loaded.require().run
        name, given = run.name, run.output_dir
    return store_of(file), resolve_path(given or f"runs/{name}", file.absolute().parent), name


def stages_of(checkpoint: str) -> tuple[type[Inputs], ...]:
    """The stages that have to be as they were applied where a checkpoint is named so, by their inputs."""
    from runner.inputs.select import SelectInputs
    from runner.inputs.train import TrainInputs

    if checkpoint == "best":
        return (TrainInputs, SelectInputs)
    is_of_run = checkpoint == "last" or checkpoint.partition(":")[0].isdigit()
    return (TrainInputs,) if is_of_run else ()


def applied_run(file: Path, settings: tuple[str, ...], stages: Sequence[type[Inputs]]) -> Prepared:
    """The run as its folder last applied it, `settings` over that. Raises `Invalid` where one of `stages` is another now."""
    from runner.plan.history import last_applied, settings_text

    store, output, name = run_of(file, settings)
    applied = last_applied(store, output)
    if applied is None:
        _say_elsewhere(store, file)
        return prepared_run(file, settings, may_defer=False)
    given = (*applied.settings, *settings)
    prepared = prepared_run(file, given, may_defer=False)
    _check(applied, prepared, stages, settings)
    if applied.settings:
        out.say(f"note: run {name!r} as it was last applied, with {settings_text(applied.settings)}")
    return prepared


def _say_elsewhere(store: Store, file: Path) -> None:
    """A --set of the run's name or folder that was not said again."""
    from runner.plan.history import Applied, settings_text

    for place, record in store.registry()[0]:
        settings = Applied(record, place).settings
        own = [typed for typed in settings if typed.partition("=")[0].strip() in ("run", "run.name", "run.output_dir")]
        if own and record.get("file") == store.portable(file):
            out.say(
                f"note: {file.name} was applied as run {record.get('name')!r}; that run is named by {settings_text(own)}"
            )


def _check(applied: Applied, prepared: Prepared, stages: Sequence[type[Inputs]], settings: tuple[str, ...]) -> None:
    from runner.plan.current import current_graph
    from runner.plan.history import settings_text
    from runner.plan.reasons import OTHER_VERSION, Differences, Reason

    graph = current_graph(prepared)
    differences = Differences(applied, graph)
    reasons: list[Reason] = []
    for node in map(graph.node, stages):
        if applied.fingerprint(node.name) != node.fingerprint:
            reasons += differences.of(node.name) or ([Reason(OTHER_VERSION)] if node.stage.locked else [])
    if not reasons:
        return
    listed = "".join(f"\n  {reason}" for reason in dict.fromkeys(reason.text for reason in reasons))
    file = prepared.source.file
    apply = f"runner apply {file}" + (
        f" {settings_text(given)}" if (given := prepared.source.overrides.values()) else ""
    )
    changes = {reason.key: reason.old for reason in reasons if reason.key is not None}
    typed = {text.partition("=")[0].strip() for text in settings}
    back = _as_settings(changes, prepared) if all(reason.key is not None for reason in reasons) else []
    if typed & set(changes):
        otherwise = "leave that --set out"
    elif back:
        otherwise = f"add {settings_text(back)} for what was applied"
    else:
        otherwise = "take the change back"
    raise Invalid(
        f"this is not what run {prepared.config.run.name!r} last applied:{listed}", hint=f"{apply}, or {otherwise}"
    )


def _as_settings(changes: Mapping[str, object], prepared: Prepared) -> list[str]:
    """Few plain keys, as --set would give them their old values; nothing where that cannot be said."""
    import json

    derived = {item.key for item in prepared.derived}
    own = [(path, old) for path, old in changes.items() if path not in derived]
    if len(own) > _AS_APPLIED or any(old is None for _, old in own):
        return []
    return [f"{path.replace('[', '.').replace(']', '')}={json.dumps(old, ensure_ascii=False)}" for path, old in own]
