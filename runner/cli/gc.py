"""runner gc."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from runner.cli import out
from runner.errors import Exit
from runner.store.store import find_store

if TYPE_CHECKING:
    from runner.store.gc import Garbage


@click.command()
@click.argument("place", type=click.Path(path_type=Path), default=Path("."))
@click.option("--delete", is_flag=True, help="Delete it; without this nothing is deleted.")
def command(place: Path, delete: bool) -> int:
    """Show what no run of the store needs any more: items, artifacts, workspaces, exports.

    A run needs what it last applied, and what its folder shows. Refused (exit 5) while a run of the store goes on.
    """
    from runner.plan.render import size_text
    from runner.store.gc import collect_garbage, delete_garbage
    from runner.store.lock import alone

    store = find_store(place.parent if place.is_file() else place)
    if not store.root.is_dir():
        out.say(f"nothing to delete: there is no store {store.root} yet")
        return Exit.DONE
    with alone(store):
        garbage = collect_garbage(store)
        _show(garbage)
        if delete and garbage.entries:
            delete_garbage(store, garbage)
    total = size_text(sum(entry.size for entry in garbage.entries))
    if not garbage.entries:
        out.say("nothing to delete")
    elif delete:
        out.say(f"deleted: {total}")
    else:
        out.say(f"{total} could be deleted: runner gc --delete")
    return Exit.DONE


def _show(garbage: Garbage) -> None:
    from runner.plan.render import size_text

    for note in garbage.notes:
        out.say(f"note: {note}")
    for kind, entries in sorted(garbage.by_kind().items()):
        out.data(f"{kind:<20} {len(entries):>6}  {size_text(sum(entry.size for entry in entries))}")
