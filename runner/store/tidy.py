"""Deletes what killed processes left unfinished; torch-free."""

from __future__ import annotations

from pathlib import Path

from runner.atomic import sweep, sweep_tree
from runner.store.published import Published
from runner.store.store import Store


def tidy(store: Store, output_dir: Path) -> None:
    """In the store, in a run's folder, and where the run was about to publish."""
    store.tidy()
    sweep_tree(output_dir)
    for path in Published.read(output_dir).intended:
        sweep(Path(path).parent, Path(path).name)
