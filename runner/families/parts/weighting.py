"""Weighted prompts: `(word)` is 1.1, `((word))` 1.21, `[word]` 1 / 1.1, `(word:1.5)` 1.5; `\\(` is a bracket itself.

The notation is that of AUTOMATIC1111's web UI, which people's prompts are written in.
"""

from __future__ import annotations

import re

ROUND = 1.1
_TOKEN = re.compile(r"\\[\\()\[\]]|[()\[\]]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[^\\()\[\]:]+|:|\\")


def parse_weights(text: str) -> list[tuple[str, float]]:
    """Runs of text with their weights, in order; unclosed brackets hold to the end."""
    runs: list[list[object]] = []
    opened: list[tuple[str, int]] = []

    def scale(start: int, factor: float) -> None:
        for run in runs[start:]:
            run[1] = float(run[1]) * factor  # type: ignore[arg-type]

    for match in _TOKEN.finditer(text):
        token = match.group()
        if token in ("(", "["):
            opened.append((token, len(runs)))
        elif match.group(1) is not None and opened and opened[-1][0] == "(":
            scale(opened.pop()[1], float(match.group(1)))
        elif token == ")" and opened and opened[-1][0] == "(":
            scale(opened.pop()[1], ROUND)
        elif token == "]" and opened and opened[-1][0] == "[":
            scale(opened.pop()[1], 1 / ROUND)
        else:
            literal = token[1:] if len(token) == 2 and token[0] == "\\" else token
            runs.append([literal, 1.0])
    for bracket, start in opened:
        scale(start, ROUND if bracket == "(" else 1 / ROUND)
    merged: list[tuple[str, float]] = []
    for content, weight in runs:
        assert isinstance(content, str)
        assert isinstance(weight, float)
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + content, weight)
        else:
            merged.append((content, weight))
    return merged or [("", 1.0)]
