"""Gathers what the strip and the page show from the store, and writes both; torch-free."""

from __future__ import annotations

import json
from typing import Any

from runner import __version__
from runner.atomic import new_file, remove, write_text
from runner.inputs.sample import SampleInputs, candidates
from runner.inputs.train import TrainInputs
from runner.plan.compile import Graph
from runner.plan.current import trained_folder
from runner.plan.history import flat_config
from runner.plan.stages.train import kind_of
from runner.report.page import Report, label, render_report
from runner.report.strip import Column, draw_strip
from runner.store.published import Published
from runner.store.run_folder import sample_name
from runner.store.samples import is_sound


def columns_of(graph: Graph, selection: dict[str, Any]) -> list[Column]:
    """The strip's columns: the base model and each checkpoint, with the pictures that there are."""
    columns: list[Column] = []
    prepared, sample = graph.prepared, graph.of(SampleInputs)
    chosen = (selection["chosen"]["step"], selection["chosen"]["weights"])
    for step, weights in candidates(sample.steps, sample.ema, with_base=True):
        keys = [sample.key(prompt, step, weights) for prompt in sample.prompts]
        for key, prompt in zip(keys, sample.prompts, strict=True):
            if not is_sound(prepared.store, key, prompt):
                remove(prepared.store.item("samples", key))  # so that the next plan makes it again
        pictures = {row: prepared.store.item("samples", key) for row, key in enumerate(keys)}
        videos = {
            row: f"samples/{sample_name(step, weights, prompt.index)}.mp4"
            for row, prompt in enumerate(sample.prompts)
            if prompt.is_video
        }
        columns.append(Column(label(step, weights), pictures, (step, weights) == chosen, videos))
    return columns


def write_report(graph: Graph, selection: dict[str, Any], plan_text: str, environment: dict[str, str]) -> None:
    """strip.png and report.html: of each stage what it tells, the last one first."""
    prepared, prompts = graph.prepared, graph.of(SampleInputs).prompts
    output = prepared.output_dir
    columns = columns_of(graph, selection) if prompts else []
    strip = None
    if prompts:
        strip = draw_strip([p.prompt for p in prompts], [(p.width, p.height) for p in prompts], columns)
        with new_file(output / "strip.png") as temporary:
            strip.save(temporary, "PNG", optimize=True)
    manifest = trained_folder(graph).finished_record()
    assert manifest is not None
    told = [node.stage.told(node.inputs, graph) for node in reversed(graph.nodes.values())]
    cards = [card for own in told for card in own.cards]
    noted = prepared.dataset_notes.render()
    blocks = [
        *([("Dataset notes", "\n".join(noted))] if noted else []),
        *(block for own in told for block in own.blocks),
        ("Plan", plan_text),
        ("run.toml", prepared.source.text),
        (
            "Resolved configuration",
            "\n".join(
                f"{key} = {json.dumps(value, ensure_ascii=False)}"
                for key, value in flat_config(prepared.config).items()
            ),
        ),
        ("Environment", "\n".join(f"{name} {version}" for name, version in environment.items())),
    ]
    report = Report(
        name=prepared.config.run.name,
        lead=f"{prepared.spec.title}, {kind_of(prepared)}",
        cards=cards,
        prompts=[p.prompt for p in prompts],
        columns=columns,
        strip=strip,
        history=manifest["history"],
        selection=selection,
        blocks=blocks,
        footer=f"runner {__version__}, fingerprint {graph.node(TrainInputs).fingerprint[:16]}",
    )
    write_text(output / "report.html", render_report(report))
    Published.renew(output, (output / "report.html", output / "strip.png"))
