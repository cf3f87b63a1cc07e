"""FramePack's way of saying something for sections of a video: `0:text;;;1:text;;;-1:text;;;0-2:text`; torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SEPARATOR = ";;;"
_SPEC = re.compile(r"\s*(-?\d+|\d+-\d+):(.*)", re.DOTALL)
MOST_SECTIONS = 1000


class SectionProblem(Exception):
    """A specification that does not fit the number of sections."""


@dataclass(frozen=True)
class Sectioned:
    """What is said for which sections: section number (negative: from the end) → value."""

    values: dict[int, str]
    specs: dict[int, str]
    """Section number → how it was written."""

    def of(self, index: int, sections: int) -> str | None:
        """The value of section `index` (in time) of `sections`: counted from the end, else from the front, else that of
        section 0, else the smallest number from the front that there is, else the most negative one."""
        for number in (index - sections, index, 0):
            if number in self.values:
                return self.values[number]
        front = [number for number in self.values if number >= 0]
        chosen = min(front) if front else min(self.values, default=None)
        return None if chosen is None else self.values[chosen]

    def check(self, sections: int) -> None:
        """Raises `SectionProblem` where a section that does not exist is named."""
        for number, spec in self.specs.items():
            if not -sections <= number < sections:
                plural = "section" if sections == 1 else "sections"
                raise SectionProblem(
                    f"{spec!r} names section {number} of a video of {sections} {plural} (0 to {sections - 1}, or -1 to {-sections})"
                )


def parse_sections(text: str) -> Sectioned:
    """A text without specifications is said for section 0, and so for all. Raises `SectionProblem`.

    A single letter before a colon is a drive of Windows, not a specification.
    """
    parts = [part for part in text.split(SEPARATOR) if part.strip()]
    values: dict[int, str] = {}
    specs: dict[int, str] = {}
    for part in parts:
        match = _SPEC.fullmatch(part)
        spec, value = (match.group(1), match.group(2).strip()) if match else ("0", part.strip())
        if match is None and len(parts) > 1 and 0 in values:
            raise SectionProblem(f"{part.strip()!r} does not say its section: write 1:{part.strip()}")
        if not value:
            raise SectionProblem(f"{part.strip()!r} says nothing for its section")
        for number in _numbers(spec):
            if number in values:
                raise SectionProblem(f"section {number} is given twice ({specs[number]!r} and {spec!r})")
            values[number], specs[number] = value, spec
    return Sectioned(values, specs)


def _numbers(spec: str) -> Sequence[int]:
    if any(len(digits) > 9 or int(digits) > MOST_SECTIONS for digits in re.findall(r"\d+", spec)):
        raise SectionProblem(f"{spec[:20]!r} names a section that no video has: {MOST_SECTIONS:,} are the most")
    first, dash, last = spec.partition("-") if not spec.startswith("-") else (spec, "", "")
    if not dash:
        return (int(first),)
    if int(last) < int(first):
        raise SectionProblem(f"the range {spec!r} ends before it begins")
    return range(int(first), int(last) + 1)


def joined(values: Mapping[int, str]) -> str:
    """The text of what is said for each section."""
    if set(values) == {0}:
        return values[0]
    return SEPARATOR.join(f"{number}:{value}" for number, value in values.items())
