"""What files hold, read only where they have changed since the index was told; torch-free."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from runner.dataset.frames import frame_facts, frame_names
from runner.dataset.probe import probe_image
from runner.store.index import FileContent, Index, Stamp, stamp

Progress = Callable[[int, int], None]


def known_sequence(location: str, index: Index) -> FileContent:
    """A folder of pictures as a video."""
    try:
        names = frame_names(location)
    except OSError as error:
        return FileContent("", problem=f"cannot be read: {error.strerror}")
    if not names:
        return FileContent("", problem="is a folder without pictures")
    known = known_pictures(location, names, index)
    broken = next((name for name in names if known[name].problem is not None), None)
    if broken is not None:
        return FileContent("", problem=f"has a frame that cannot be used: {broken} {known[broken].problem}")
    first = known[names[0]]
    for name in names:
        size = known[name].width, known[name].height
        if size != (first.width, first.height):
            sizes = f"{name} is {size[0]}x{size[1]}, the first, {names[0]}, is {first.width}x{first.height}"
            return FileContent("", problem=f"has frames of several sizes: {sizes}")
    digest = hashlib.sha256("\n".join(known[name].digest for name in names).encode()).hexdigest()
    words = [*(word for name in names for word in known[name].facts.split()), *frame_facts(names)]
    return FileContent(digest, first.width, first.height, str(len(names)), facts=" ".join(dict.fromkeys(words)))


def known_pictures(location: str, names: list[str], index: Index) -> dict[str, FileContent]:
    """What pictures of a folder are, read only where they have changed."""
    known = index.unchanged(location, names)
    known.update(read_anew(location, [name for name in names if name not in known], index, probe_image, None))
    return known


def read_anew(
    location: str, names: list[str], index: Index, probe: Callable[[Path], FileContent], progress: Progress | None
) -> dict[str, FileContent]:
    """Reads these files in parallel, and remembers what they hold."""
    found: dict[str, FileContent] = {}
    fresh: list[tuple[str, Stamp, FileContent]] = []

    def read(name: str) -> tuple[str, Stamp, FileContent]:
        path = Path(location, name)
        try:
            before = stamp(path.stat())  # a file that changes while it is read is read again next time
        except OSError:  # a link to nothing: the probe says so
            before = (0, 0, 0, 0)
        return name, before, probe(path)

    if not names:
        return found
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for done, entry in enumerate(pool.map(read, names), 1):
            found[entry[0]] = entry[2]
            if entry[2].problem is None or entry[2].digest:  # what could not be read may be readable the next time
                fresh.append(entry)
            if progress is not None:
                progress(done, len(names))
            if len(fresh) >= 2000:
                index.put_files(location, fresh)
                fresh = []
    index.put_files(location, fresh)
    return found
