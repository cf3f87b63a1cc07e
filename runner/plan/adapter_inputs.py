"""The adapter files that a run begins with, held against its model by their headers: network.init_from, from which its
adapters start, and network.base_weights, which are merged into the model before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from runner.errors import Invalid
from runner.families.spec import FamilySpec
from runner.files import file_problem, near_name, resolve_path
from runner.formats.adapter_fit import check_mergeable
from runner.formats.adapter_start import check_adapter_file
from runner.model.model import Model
from runner.model.targets import Target
from runner.plan.places import Report
from runner.weights.headers import read_header
from schemas.network import Network


def start_file(network: Network | None, targets: Sequence[Target], folder: Path, error: Report) -> Path | None:
    """The file of network.init_from. What is wrong with it is reported."""
    if network is None or network.init_from is None:
        return None
    key = ("network", "init_from")
    file = resolve_path(network.init_from, folder)
    missing = file_problem(file)
    if missing is not None:
        error(key, missing, near_name(file))
        return None
    try:
        problem = check_adapter_file(file, read_header(file), targets, network.decompose_factor) if targets else None
    except Invalid as invalid:
        error(key, str(invalid), invalid.diagnostics[0].hint)
        return None
    if problem is not None:
        error(key, f"{file.name} does not fit: {problem}", "its rank, alpha and layers must be those of [network]")
    return file


def merged_files(
    network: Network | None, spec: FamilySpec, model: Model | None, folder: Path, error: Report
) -> list[tuple[Path, float]]:
    """The files of network.base_weights with their multipliers. What is wrong with them is reported."""
    found: list[tuple[Path, float]] = []
    for index, text in enumerate(network.base_weights if network is not None else ()):
        key = ("network", "base_weights", index)
        file, multiplier = file_and_multiplier(text, folder)
        found.append((file, multiplier))
        if not math.isfinite(multiplier):
            error(key, f"{text}: the multiplier must be a finite number", "write FILE:0.8")
            continue
        missing = file_problem(file)
        if missing is not None:
            error(key, missing, near_name(file) or 'write "FILE" or "FILE:MULTIPLIER"')
            continue
        if model is None:
            continue
        try:
            checked = check_mergeable(read_header(file), spec.layers(model))
        except Invalid as invalid:
            error(key, str(invalid), invalid.diagnostics[0].hint)
            continue
        if checked.problem is not None:
            hint = _SKIPPED if checked.skippable else f"name an adapter for {spec.title}"
            error(key, f"{file.name} does not fit: {checked.problem}", hint)
    return found


_SKIPPED = (
    "take these out of the file; or take this line out and train on what `runner sample run.toml --checkpoint base "
    "--lora FILE --skip-unknown --save-merged NEW.safetensors` writes"
)


def file_and_multiplier(text: str, folder: Path) -> tuple[Path, float]:
    """`FILE` or `FILE:MULTIPLIER`; a file may have a colon in its name. Raises `Invalid` where none can be called so."""
    whole = resolve_path(text, folder)
    name, _, number = text.rpartition(":")
    try:
        return (whole, 1.0) if not name or file_problem(whole) is None else (resolve_path(name, folder), float(number))
    except ValueError:
        return whole, 1.0
