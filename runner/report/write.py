"""Gathers what the strip and the page show from the store, and writes both; torch-free."""

from __future__ import annotations

import json
from typing import Any

from runner import __version__
from runner.atomic import new_file, remove, write_text
from runner.inputs import candidates
from runner.plan.compile import Graph
from runner.plan.history import flat_config
from runner.plan.prepare import Prepared
from runner.report.page import Report, label, render_report
from runner.report.strip import Column, draw_strip
from runner.store.published import Published
from runner.store.run_folder import sample_name
from runner.store.samples import is_sound
from runner.store.training import TrainFolder


def columns_of(prepared: Prepared, graph: Graph, selection: dict[str, Any]) -> list[Column]:
    """The strip's columns: the base model and each checkpoint, with the pictures that there are."""
    columns = []
    chosen = (selection["chosen"]["step"], selection["chosen"]["weights"])
    for step, weights in candidates(graph.sample.steps, graph.sample.ema, with_base=True):
        keys = [graph.sample.key(prompt, step, weights) for prompt in graph.sample.prompts]
        for key, prompt in zip(keys, graph.sample.prompts, strict=True):
            if not is_sound(prepared.store, key, prompt):
                remove(prepared.store.item("samples", key))  # so that the next plan makes it again
        pictures = {row: prepared.store.item("samples", key) for row, key in enumerate(keys)}
        videos = {
            row: f"samples/{sample_name(step, weights, prompt.index)}.mp4"
            for row, prompt in enumerate(graph.sample.prompts)
            if prompt.is_video
        }
        columns.append(Column(label(step, weights), pictures, (step, weights) == chosen, videos))
    return columns


def write_report(
    prepared: Prepared,
    graph: Graph,
    selection: dict[str, Any],
    trained: TrainFolder,
    plan_text: str,
    environment: dict[str, str],
) -> None:
    """strip.png and report.html."""
    output, prompts = prepared.output_dir, graph.sample.prompts
    columns = columns_of(prepared, graph, selection) if prompts else []
    strip = None
    if prompts:
        strip = draw_strip([p.prompt for p in prompts], [(p.width, p.height) for p in prompts], columns)
        with new_file(output / "strip.png") as temporary:
            strip.save(temporary, "PNG", optimize=True)
    manifest = trained.finished_record()
    assert manifest is not None
    chosen = selection["chosen"]
    kind = (
        f"{prepared.config.network.type} of rank {prepared.config.network.rank}"
        if prepared.config.network
        else "full fine-tune"
    )
    cards = [
        ("chosen checkpoint", f"step {label(chosen['step'], chosen['weights'])}"),
        ("steps", f"{graph.train.steps:,}"),
        ("items", f"{len(graph.train.items):,} + {len(graph.select.held_out)} held out"),
        ("trained", kind),
        ("base model", prepared.model.label),
        ("seconds a step", f"{manifest['seconds_per_step']:.3f}"),
    ]
    noted = prepared.dataset_notes.render()
    blocks = [
        *([("Dataset notes", "\n".join(noted))] if noted else []),
        ("Plan", plan_text),
        ("run.toml", prepared.source.text),
        ("Resolved configuration", "\n".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in flat_config(prepared.config).items())),
        ("Environment", "\n".join(f"{name} {version}" for name, version in environment.items())),
    ]  # fmt: skip
    report = Report(
        prepared.config.run.name, f"{prepared.spec.title}, {kind}", cards, [p.prompt for p in prompts], columns, strip,
        manifest["history"], selection, blocks, f"runner {__version__}, fingerprint {graph.fingerprint('train')[:16]}",
    )  # fmt: skip
    write_text(output / "report.html", render_report(report))
    Published.renew(output, (output / "report.html", output / "strip.png"))
