"""Notes about a dataset: whatever is left out, changed or read in another way than a person may think, counted.

The plan shows them in a section of their own, `validate --json` and `plan --json` as records, the report as a block.
A note is one sentence with its count, a few examples and a way out; findings of one kind are one note, however many.

Sentences are written for many, with a tilde before each word that is another one for a single finding: "~pictures ~have no
caption file" becomes "1 picture has no caption file", or "1 of 6 pictures has no caption file".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

EXAMPLES = 5
"""So many names are kept of each note."""
_FOR_ONE = {
    "are": "is",
    "have": "has",
    "they": "it",
    "them": "it",
    **{verb: f"{verb}s" for verb in ("belong", "differ", "end", "hold", "lie", "look", "name", "use")},
    **{
        f"{noun}s": noun
        for noun in ("caption", "file", "folder", "image", "item", "key", "mask", "name", "picture", "video")
    },
}
_MARKED = re.compile(rf"~({'|'.join(_FOR_ONE)})\b")


def _numbered(sentence: str, count: int, of: int | None = None) -> str:
    """A sentence for so many findings; the first marked word is of the whole number, where that is told."""
    numbers = iter((count if of is None else of,))
    return _MARKED.sub(lambda word: _FOR_ONE[word[1]] if next(numbers, count) == 1 else word[1], sentence)


@dataclass(kw_only=True)
class Note:
    """One kind of finding: "4 of 6 pictures have no caption file and use `cat`"."""

    message: str
    """What follows the count: "~pictures ~have no caption file and ~use `cat`"."""
    way_out: str
    """What to do where this is not what was meant."""
    count: int = 0
    of: int | None = None
    """Out of how many."""
    examples: list[str] = field(default_factory=list)

    def words(self) -> tuple[str, str]:
        """Message and way out for this count."""
        return _numbered(self.message, self.count, self.of), _numbered(self.way_out, self.count)

    def render(self) -> str:
        """The note as one line of text."""
        message, way_out = self.words()
        whole = "" if self.of is None else f" of {self.of:,}"
        named = ", ".join(self.examples)
        more = ", …" if named and self.count > len(self.examples) else ""
        listed = f" ({named}{more})" if named else ""
        return f"{self.count:,}{whole} {message}{listed}" + (f"; {way_out}" if way_out else "")

    def as_record(self) -> dict[str, object]:
        """The note for `--json`."""
        message, way_out = self.words()
        return {"message": message, "count": self.count, "of": self.of, "examples": self.examples, "way_out": way_out}


class Notes:
    """Gathers notes. Those of equal message and way out are one."""

    def __init__(self) -> None:
        self._notes: dict[tuple[str, str], Note] = {}

    def add(
        self,
        message: str,
        way_out: str,
        examples: Iterable[str] = (),
        *,
        count: int | None = None,
        of: int | None = None,
    ) -> None:
        """`message` follows the count, which is that of the examples where it is not given; a note of 0 is not shown."""
        named = list(examples)
        number = len(named) if count is None else count
        if number == 0 and of is None:
            return
        note = self._notes.setdefault((message, way_out), Note(message=message, way_out=way_out))
        note.count += number
        if of is not None:
            note.of = (note.of or 0) + of
        note.examples += named[: EXAMPLES - len(note.examples)]

    def __iter__(self) -> Iterator[Note]:
        return (note for note in self._notes.values() if note.count)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def render(self) -> list[str]:
        """A line each."""
        return [note.render() for note in self]

    def as_records(self) -> list[dict[str, object]]:
        """For `--json`."""
        return [note.as_record() for note in self]
