"""report.html: one self-contained page, readable on a phone, in light and dark; made from what the store holds."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from PIL import Image

from runner.pictures import read_picture
from runner.report.curves import Line, chart
from runner.report.strip import Column
from runner.shipped import shipped

PAGE_PICTURE = 512
"""Pictures are embedded at most this large."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that the page shows."""

    name: str
    lead: str
    cards: list[tuple[str, str]]
    prompts: list[str]
    columns: list[Column]
    strip: Image.Image | None
    history: list[dict[str, float]]
    selection: dict[str, Any]
    blocks: list[tuple[str, str]]
    footer: str


def render_report(report: Report) -> str:
    """The page's HTML."""
    environment = Environment(loader=FileSystemLoader(shipped("templates")), autoescape=True)
    chosen = next((index for index, column in enumerate(report.columns) if column.chosen), len(report.columns) - 1)
    rows = [_row(candidate) for candidate in report.selection["candidates"]]
    smallest = min(
        (_longest(file) for column in report.columns for file in column.pictures.values() if file.is_file()),
        default=512,
    )
    return environment.get_template("report.html").render(
        name=report.name,
        lead=report.lead,
        cards=[{"name": name, "value": value} for name, value in report.cards],
        prompts=report.prompts,
        columns=[_column(column, len(report.prompts)) for column in report.columns],
        labels=[column.label + (" — chosen" if column.chosen else "") for column in report.columns],
        chosen_column=chosen,
        rendering="pixelated" if smallest < 96 else "auto",
        strip=_data_uri(report.strip) if report.strip is not None else "",
        figures=_figures(report),
        rows=rows,
        has_similarity=any("similarity" in row for row in report.selection["candidates"]),
        selection_note=selection_note(report.selection),
        blocks=[{"title": title, "text": text} for title, text in report.blocks],
        footer=report.footer,
    )


def selection_note(selection: dict[str, Any]) -> str:
    """What was measured and who chose, in words."""
    items = selection["items"]
    if not selection["metrics"]:
        return f"Nothing was measured. Chosen: {selection['reason']}."
    measured = (
        f"{items['held_out']} held-out items"
        if items["held_out"]
        else f"{items['training']} training items (nothing is held out: this cannot show overfitting)"
    )
    who = {"user": "By hand", "run.toml": "By run.toml", "runner": "By the rule"}[selection["decided_by"]]
    return f"Stable loss on {measured}, {len(selection['levels'])} noise levels, fixed noise. {who}: {selection['reason']}."


def _row(candidate: dict[str, Any]) -> dict[str, Any]:
    def number(name: str, sign: bool = False) -> str:
        value = candidate.get(name)
        return "" if value is None else f"{value:+.5f}" if sign else f"{value:.5f}"

    difference = number("difference", True)
    if difference:
        difference += f" ± {candidate['standard_error']:.5f}"
    return {
        "label": label(candidate["step"], candidate["weights"]),
        "loss": number("stable_loss"),
        "difference": difference,
        "gap": number("gap", True),
        "similarity": number("similarity"),
        "verdict": candidate["verdict"],
        "reason": candidate["reason"],
    }


def label(step: int, weights: str) -> str:
    """`base`, `50`, `50 ema`: what stands over a column."""
    if step == 0:
        return "base"
    return str(step) if weights == "raw" else f"{step} {weights}"


def _figures(report: Report) -> list[dict[str, str]]:
    selection, history = report.selection, report.history
    chosen = selection["chosen"]
    marks = [(float(chosen["step"]), "chosen")]
    figures = []
    if selection["metrics"]:
        lines = []
        kinds = dict.fromkeys(row["weights"] for row in selection["candidates"])
        for weights, kind in zip(kinds, ("a", "d"), strict=False):
            own = [
                row
                for row in selection["candidates"]
                if row["weights"] == weights and row.get("stable_loss") is not None
            ]
            base = [(0.0, selection["base"]["stable_loss"])] if selection["base"] and weights == "raw" else []
            name = "stable loss" if weights == "raw" else f"stable loss, {weights}"
            lines.append(Line(name, [*base, *((float(row["step"]), row["stable_loss"]) for row in own)], kind, True))
            if weights == "raw" and any("training_loss" in row for row in own):
                points = [
                    (float(row["step"]), row["training_loss"]) for row in own if row.get("training_loss") is not None
                ]
                lines.append(Line("the same on training items", points, "c", True))
        figures.append(
            {
                "title": f"Stable loss on {selection['measured_on']}",
                "svg": chart(lines, "step", "stable loss", marks),
                "note": "",
            }
        )
        figures.append(
            {
                "title": "Stable loss by noise level",
                "svg": _levels(selection),
                "note": "left: little noise (detail); right: much noise (composition)",
            }
        )
    losses = [(float(line["step"]), line["loss"]) for line in history]
    figures.append(
        {
            "title": "Training loss",
            "svg": chart(
                [Line("each log line", losses, "a"), Line("running mean", _smooth(losses), "b")],
                "step",
                "training loss",
                marks,
            ),
            "note": "noisy by nature: every step has other noise levels",
        }
    )
    lines = [
        Line(", ".join(names), points, kind)
        for (points, names), kind in zip(_rates(history), cycle("abcd"), strict=False)
    ]
    figures.append({"title": "Learning rate", "svg": chart(lines, "step", "learning rate"), "note": ""})
    return figures


def _rates(history: list[dict[str, float]]) -> list[tuple[tuple[tuple[float, float], ...], list[str]]]:
    """The courses of the learning rate, each with the groups that have it."""
    found: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for name in sorted({name for line in history for name in line if name == "lr" or name.startswith("lr/")}):
        points = tuple((float(line["step"]), line[name]) for line in history if name in line)
        found.setdefault(points, []).append(name.removeprefix("lr/"))
    return list(found.items())


def _levels(selection: dict[str, Any]) -> str:
    levels = [float(level) for level in selection["levels"]]
    chosen = next((row for row in selection["candidates"] if row["verdict"] == "chosen"), None)
    last = selection["candidates"][-1]
    lines = []
    for name, row, kind in (("base", selection["base"], "b"), ("chosen", chosen, "a"), ("last", last, "c")):
        if row and row.get("per_level"):
            points = [
                (level, value) for level, value in zip(levels, row["per_level"], strict=True) if value is not None
            ]
            lines.append(Line(name, points, kind, True))
    return chart(lines, "timestep", "stable loss by noise level", log=True)


def _smooth(points: list[tuple[float, float]], share: float = 0.9) -> list[tuple[float, float]]:
    """An exponential mean, corrected for its start."""
    smoothed: list[tuple[float, float]] = []
    total = weight = 0.0
    for x, y in points:
        if y != y:
            continue
        total, weight = total * share + y * (1 - share), weight * share + (1 - share)
        smoothed.append((x, total / weight))
    return smoothed


def _column(column: Column, rows: int) -> dict[str, Any]:
    pictures = [_data_uri_of_file(column.pictures.get(row)) for row in range(rows)]
    return {"label": column.label, "pictures": pictures, "videos": [column.videos.get(row, "") for row in range(rows)]}


def _data_uri_of_file(file: Path | None) -> str:
    if file is None or not file.is_file():
        return ""
    with read_picture(file) as picture:
        small = picture.convert("RGB")
        small.thumbnail((PAGE_PICTURE, PAGE_PICTURE), Image.Resampling.LANCZOS)
        return _data_uri(small)


def _data_uri(picture: Image.Image) -> str:
    stream = BytesIO()
    if max(picture.size) > 96 and picture.width * picture.height > 200_000:
        picture.save(stream, "WEBP", quality=88)
        return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()
    picture.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _longest(file: Path) -> int:
    with read_picture(file) as picture:
        return max(picture.size)
