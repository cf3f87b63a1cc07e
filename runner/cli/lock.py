"""run.lock from a run's point of view: what goes into it, and what `apply --locked` compares."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.errors import LockedDiffers
from runner.files import file_digest

if TYPE_CHECKING:
    from runner.execute.apply import Outcome
    from runner.plan.compile import Graph
    from runner.plan.diff import Plan
    from runner.plan.prepare import Prepared

_HINT = "apply without --locked to write a new lock, or bring them back"


def _content(prepared: Prepared, graph: Graph) -> dict[str, dict[str, Any]]:
    """What is known without torch."""
    from runner.identity import fingerprint
    from runner.plan.history import flat_config

    config = {key: value for key, value in flat_config(prepared.config).items() if key != "run.output_dir"}
    weights = {name: fact.value for name, fact in prepared.weights.items() if fact.value is not None}
    return {
        "inputs": {**weights, "configuration": fingerprint(config)},
        "fingerprints": {name: node.fingerprint for name, node in graph.nodes.items() if node.stage.locked},
        "bits": graph.runtime.bits(),
    }


def check_lock(prepared: Prepared, plan: Plan) -> str:
    """Raises `LockedDiffers` where the lock says otherwise; returns its device, to be compared once torch is loaded."""
    from runner.store.lockfile import differences, environment, read_lock

    lock = read_lock(prepared.source.file)
    device = str(lock.get("environment", {}).get("device", ""))
    found = differences(lock, {**_content(prepared, plan.graph), "environment": environment(device)})
    if found:
        shown = "".join(f"\n  {line}" for line in found[:20])
        what = "1 thing differs" if len(found) == 1 else f"{len(found)} things differ"
        raise LockedDiffers(f"{what} from {prepared.source.file.with_suffix('.lock').name}:{shown}", hint=_HINT)
    return device


def check_device(locked: str, device: str) -> None:
    """Raises `LockedDiffers` where this is another device than the lock's, or has another number of threads."""
    if locked != device:
        raise LockedDiffers(f"1 thing differs from the lock:\n  environment.device: {locked} → {device}", hint=_HINT)


def save_lock(file: Path, settings: tuple[str, ...], prepared: Prepared, outcome: Outcome) -> None:
    """Writes the lock of a finished run, its result included."""
    from runner.store.lockfile import write_lock

    assert outcome.selection is not None
    content = _content(prepared, outcome.graph)
    content["environment"] = dict(outcome.environment)
    digest = file_digest(prepared.output_dir / "best.safetensors")
    chosen = outcome.selection["chosen"]
    content["result"] = {"step": chosen["step"], "weights": chosen["weights"], "best.safetensors": digest}
    if settings:
        content["settings"] = {typed.partition("=")[0].strip(): typed.partition("=")[2].strip() for typed in settings}
    write_lock(file, content)
