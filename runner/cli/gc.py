"""runner gc."""

from __future__ import annotations

from pathlib import Path

import click

from runner.cli import out
from runner.errors import Exit
from runner.store.store import find_store


@click.command()
@click.argument("place", type=click.Path(path_type=Path), default=Path("."))
@click.option("--delete", is_flag=True, help="Delete it; without this nothing is deleted.")
def command(place: Path, delete: bool) -> int:
    """Show what no run of the store needs any more: items, artifacts, workspaces, exports."""
    from runner.plan.render import size_text
    from runner.store.gc import collect_garbage, delete_garbage

    store = find_store(place.parent if place.is_file() else place)
    garbage = collect_garbage(store)
    for note in garbage.notes:
        out.say(f"note: {note}")
    for kind, entries in sorted(garbage.by_kind().items()):
        out.data(f"{kind:<20} {len(entries):>6}  {size_text(sum(entry.size for entry in entries))}")
    total = sum(entry.size for entry in garbage.entries)
    if not garbage.entries:
        out.say("nothing to delete")
        return Exit.DONE
    if delete:
        delete_garbage(store, garbage)
        out.say(f"deleted: {size_text(total)}")
    else:
        out.say(f"{size_text(total)} could be deleted: runner gc --delete")
    return Exit.DONE
