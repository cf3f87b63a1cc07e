"""Notes about a dataset: whatever is left out, changed or read in another way than a person may think, counted.

The plan shows them in a section of their own, `validate --json` and `plan --json` as records, the report as a block.
A note is one sentence with its count, a few examples and a way out; findings of one kind are one note, however many.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

EXAMPLES = 5
"""So many names are kept of each note."""


@dataclass
class Note:
    """One kind of finding: "4 of 6 pictures have no caption file and use `cat`"."""

    message: str
    """What follows the count: "pictures have no caption file and use `cat`"."""
    way_out: str
    """What to do where this is not what was meant."""
    count: int = 0
    of: int | None = None
    """Out of how many."""
    examples: list[str] = field(default_factory=list)

    def render(self) -> str:
        """The note as one line of text."""
        whole = "" if self.of is None else f" of {self.of:,}"
        named = ", ".join(self.examples)
        more = ", …" if named and self.count > len(self.examples) else ""
        listed = f" ({named}{more})" if named else ""
        return f"{self.count:,}{whole} {self.message}{listed}" + (f"; {self.way_out}" if self.way_out else "")

    def as_record(self) -> dict[str, object]:
        """The note for `--json`."""
        return {
            "message": self.message, "count": self.count, "of": self.of, "examples": self.examples,
            "way_out": self.way_out,
        }  # fmt: skip


class Notes:
    """Gathers notes. Those of equal message and way out are one."""

    def __init__(self) -> None:
        self._notes: dict[tuple[str, str], Note] = {}

    def add(
        self, message: str, way_out: str, examples: Iterable[str] = (), *, count: int | None = None, of: int | None = None
    ) -> None:  # fmt: skip
        """`message` follows the count, which is that of the examples where it is not given; 0 adds nothing."""
        named = list(examples)
        number = len(named) if count is None else count
        if number == 0:
            return
        note = self._notes.setdefault((message, way_out), Note(message, way_out))
        note.count += number
        if of is not None:
            note.of = (note.of or 0) + of
        note.examples += named[: EXAMPLES - len(note.examples)]

    def __iter__(self) -> Iterator[Note]:
        return iter(self._notes.values())

    def __len__(self) -> int:
        return len(self._notes)

    def render(self) -> list[str]:
        """A line each."""
        return [note.render() for note in self]

    def as_records(self) -> list[dict[str, object]]:
        """For `--json`."""
        return [note.as_record() for note in self]
