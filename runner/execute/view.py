"""Brings runs/<name>/ and the published files up to date with what was chosen."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from runner.atomic import link_or_copy, remove, write_json
from runner.execute.export import Exporter
from runner.execute.publish import place
from runner.files import resolve_path
from runner.inputs.publish import PublishInputs
from runner.inputs.sample import SampleInputs, candidates
from runner.inputs.select import SelectInputs
from runner.inputs.train import TrainInputs
from runner.plan.compile import Graph
from runner.plan.prepare import Prepared
from runner.report.write import write_report
from runner.stages.job import Job
from runner.store.artifacts import read_selection
from runner.store.published import Published
from runner.store.run_folder import checkpoint_name, show_sample
from schemas.selection import Publish


def run(job: Job, _: PublishInputs) -> None:
    """publish: what was chosen, for people and for other programs."""
    graph = job.graph
    selection = read_selection(job.context.store, graph.node(SelectInputs).fingerprint)
    assert selection is not None
    exporter = Exporter(
        job.context, graph.prepared, graph.of(TrainInputs), job.checkpoints(), graph.node(TrainInputs).fingerprint
    )
    job.notes += refresh_view(graph, selection, exporter, job.plan_text, job.environment)


def refresh_view(
    graph: Graph, selection: dict[str, Any], exporter: Exporter, plan_text: str, environment: dict[str, str]
) -> list[str]:
    """Writes everything that people look at; returns notes. What is already in place is left alone."""
    prepared, publish = graph.prepared, graph.of(PublishInputs)
    output = prepared.output_dir
    published = Published.read(output)
    published.fingerprint = ""
    published.write(output)
    keep = {path: entry for path, entry in published.files.items() if not Path(path).is_relative_to(output)}
    view = Published("", keep, published.intended)
    shown = [*_checkpoints(graph, exporter, output), *_samples(prepared, graph, output)]
    write_json(output / "selection.json", selection)
    write_json(output / "resolved.json", prepared.config.model_dump(mode="json"))
    chosen = selection["chosen"]
    form = "kohya" if graph.of(TrainInputs).targets is not None else "single_file"
    best = exporter.export(chosen["step"], chosen["weights"], form, publish.dtype)
    link_or_copy(best, output / "best.safetensors")
    write_report(graph, selection, plan_text, environment)
    notes = _publish(prepared, graph, selection, exporter, view)
    for file in shown:
        view.note(file, file.name)
    for name in ("selection.json", "resolved.json", "report.html", "strip.png"):
        if (output / name).exists():
            view.note(output / name, name)
    view.note(output / "best.safetensors", str(best))
    view.fingerprint = graph.node(PublishInputs).fingerprint
    view.write(output)
    return notes


def _checkpoints(graph: Graph, exporter: Exporter, output: Path) -> list[Path]:
    """Raises `DamagedCheckpoint`: nothing damaged is shown or published."""
    places, select = [], graph.of(SelectInputs)
    for step, weights in candidates(select.steps, select.ema, with_base=False):
        source = exporter.checkpoints.verified(step, weights)
        places.append(output / "checkpoints" / checkpoint_name(step, weights))
        link_or_copy(source, places[-1])
    _drop_others(output / "checkpoints", {place.name for place in places})
    return places


def _samples(prepared: Prepared, graph: Graph, output: Path) -> list[Path]:
    sample = graph.of(SampleInputs)
    return [
        place
        for step, weights in candidates(sample.steps, sample.ema, with_base=True)
        for prompt in sample.prompts
        for place in show_sample(prepared.store, sample.key(prompt, step, weights), output, step, weights, prompt)
    ]


def _drop_others(folder: Path, wanted: set[str]) -> None:
    """Takes away the names of checkpoints that this run no longer has; the store keeps what is another run's."""
    for entry in folder.glob("step-*.safetensors"):
        if entry.name not in wanted and re.fullmatch(r"step-\d{8,}(-ema)?\.safetensors", entry.name):
            remove(entry)


def _publish(
    prepared: Prepared, graph: Graph, selection: dict[str, Any], exporter: Exporter, published: Published
) -> list[str]:
    notes: list[str] = []
    publish = graph.of(PublishInputs)
    for target in publish.targets:
        directory = resolve_path(target.directory, prepared.folder)
        for step, weights in _wanted(graph, selection, target):
            source = exporter.export(step, weights, target.format, publish.dtype)
            suffix = "" if source.is_dir() else ".safetensors"
            path = directory / (published_name(target, graph, step, weights) + suffix)
            done = place(source, path, target.mode, published, prepared.output_dir)
            if done.note:
                notes.append(done.note)
            published.write(prepared.output_dir)
    return notes


def _wanted(graph: Graph, selection: dict[str, Any], target: Publish) -> list[tuple[int, str]]:
    if target.which == "best":
        return [(selection["chosen"]["step"], selection["chosen"]["weights"])]
    select = graph.of(SelectInputs)
    return candidates(select.steps, select.ema, with_base=False)


def published_name(target: Publish, graph: Graph, step: int, weights: str) -> str:
    """The file's name without its extension."""
    template = target.name or ("{name}" if target.which == "best" else "{name}-{step:08d}")
    name = template.format(name=graph.of(PublishInputs).name, step=step, weights=weights)
    if target.which == "all" and weights != "raw" and "{weights}" not in template:
        name += f"-{weights}"
    return name
