"""A stage that nobody knows goes through plan, apply, kill, --target, gc, status and the report; and no stage is named
outside of its own entry."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest

from runner.cli.status import status_of
from runner.dataset.item_facts import CAPTIONS, column_facts
from runner.errors import Exit, Invalid, Stopped, UsageError
from runner.facts import Tree, said
from runner.inputs.train import TrainInputs
from runner.plan.compile import Graph, Run
from runner.plan.current import current_graph
from runner.plan.diff import Plan, Planning
from runner.plan.estimate import figures
from runner.plan.prepare import Prepared
from runner.plan.render import plan_record, render_plan
from runner.plan.stage import Action, Stage, Told
from runner.plan.stages.registry import registered, stages, targets
from runner.records import sound_record, write_record
from runner.store.gc import collect_garbage, delete_garbage
from runner.store.store import Store, find_store
from schemas.base import Stage as DeclaredStage
from tests.inprocess import Verbs, actions, applied, planned, prepared, verb
from tests.support import ROOT, Place, new_place

__all__ = ["verb"]


class Killed(BaseException):
    """In place of a signal that nothing can catch."""


@dataclass(frozen=True)
class ShoutInputs:
    """The captions to shout, and how."""

    captions: Mapping[str, str]
    items: Tree
    mark: str

    def facts(self) -> Tree:
        return {"items": self.items, "mark": said(self.mark)}


def captions_of(store: Store, name: str, fingerprint: str) -> dict[str, str]:
    record = sound_record(store.artifact(name, fingerprint) / "captions.json", {"captions": {str: str}})
    return dict(record["captions"]) if record is not None else {}


class Shout(Stage[ShoutInputs]):
    """Rewrites captions before they are encoded."""

    name = "shout"
    before = ("cache.text",)
    address = "tests.test_made_up_stage:shout"
    again = "captions are shouted again"
    mark = "!"

    def inputs(self, run: Run) -> ShoutInputs | None:
        collection = run.prepared.collection
        items = [*collection.items, *collection.held_out]
        if run.config.run.name == "quiet":
            return None
        texts = {item.name: item.text for item in items}
        return ShoutInputs(texts, column_facts(items, {"caption": CAPTIONS["caption"]}), self.mark)

    def pending(self, inputs: ShoutInputs, planning: Planning) -> Action:
        done = captions_of(planning.store, self.name, planning.graph.fingerprint(self.name))
        total, missing = len(inputs.captions), len(set(inputs.captions) - set(done))
        if not missing:
            return Action(node=self.name, symbol="=", summary=f"all {total} captions are shouted", total=total)
        summary = f"shout {missing} of {total} captions"
        return Action(
            node=self.name,
            symbol="~" if done else "+",
            summary=summary,
            reasons=planning.reasons(self.name),
            total=total,
            missing=missing,
        )

    def settled(self, prepared: Prepared, inputs: ShoutInputs, fingerprint: str) -> Prepared:
        done = captions_of(prepared.store, self.name, fingerprint)
        if set(inputs.captions) - set(done):
            return replace(prepared, known_after={**prepared.known_after, "caption": self.name})
        own = prepared.collection
        found = {
            kind: [item._replace(text=done[item.name]) for item in getattr(own, kind)] for kind in ("items", "held_out")
        }
        return replace(prepared, collection=replace(own, **found))

    def disk(self, inputs: ShoutInputs, plan: Plan) -> Mapping[str, int]:
        return {"shouts": 1000 * plan.actions[self.name].missing}

    def memory(self, inputs: ShoutInputs, plan: Plan) -> Mapping[str, int]:
        return {self.name: 7 * 10**9 if plan.actions[self.name].pending else 0}

    def told(self, inputs: ShoutInputs, graph: Graph) -> Told:
        done = captions_of(graph.prepared.store, self.name, graph.fingerprint(self.name))
        return Told([("shouted", f"{len(done)} captions")], [("Shouted captions", "\n".join(done.values()))])


def shout(job: Any, inputs: ShoutInputs) -> None:
    """Writes one caption after the other; what is written is kept."""
    node = job.graph.node(ShoutInputs)
    done = captions_of(job.context.store, node.name, node.fingerprint)
    job.context.events.emit("started", total=len(inputs.captions))
    for name, text in inputs.captions.items():
        if name not in done:
            done[name] = text.upper() + inputs.mark
            place = job.context.store.artifact(node.name, node.fingerprint) / "captions.json"
            place.parent.mkdir(parents=True, exist_ok=True)
            write_record(place, {"captions": done})
            job.context.events.emit("progress", done=len(done), total=len(inputs.captions))
        if job.context.stop.is_set():
            raise Stopped("stopped while shouting", job.context.stop.code)


SHOUT = Shout()
AFTER = "known after shout"


@pytest.fixture(autouse=True)
def _one_stage_more() -> Iterator[None]:
    with registered(SHOUT):
        yield


def summaries(plan: Plan) -> dict[str, str]:
    return {name: action.summary for name, action in plan.actions.items()}


def test_its_place_in_the_list() -> None:
    assert [stage.name for stage in stages()] == ["cache.latents", "shout", *get_args(DeclaredStage)[1:]]
    assert targets()[:4] == ("cache", "cache.latents", "shout", "cache.text")


def test_the_plan_says_what_is_known_and_what_only_later(place: Place) -> None:
    plan = planned(place.file)
    found = summaries(plan)
    assert (found["cache.latents"], found["shout"]) == ("encode 10 pictures", "shout 10 of 10 captions")
    assert {found[name] for name in ("cache.text", "train", "sample", "select", "publish")} == {AFTER}
    text = render_plan(plan, figures(plan, None))
    assert f"    + train          {AFTER}" in text
    assert "7.5 GB predicted at the peak (shout)" in text.replace("7.50", "7.5")
    assert "shouts 10 kB" in text
    record = plan_record(plan, figures(plan, None))
    assert {entry["fingerprint"] for entry in record["actions"] if entry["summary"] == AFTER} == {AFTER}
    assert "shout" not in planned(place.file, "run.name=quiet").actions


def test_another_caption_stage_cannot_come_before_what_it_follows() -> None:
    class Late(Shout):
        name = "late"
        follows = ("train",)

    with registered(Late()), pytest.raises(Invalid, match=r"^the stage 'late' has no place: it would come before"):
        stages()


@pytest.fixture(scope="module")
def shouted(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Place:
    """Killed while it shouted, and applied again to the end."""
    made = new_place(tmp_path_factory.mktemp("shouted") / "place", tiny_model)
    with registered(SHOUT):
        _kill_at(made, 4)
        plan = planned(made.file)
        assert summaries(plan)["shout"] == "shout 6 of 10 captions"
        assert plan.actions["shout"].symbol == "~"
        outcome = applied(made.file)
    assert outcome.published
    return made


def _kill_at(place: Place, count: int) -> None:
    from runner.core.events import Events
    from runner.execute.apply import Apply
    from runner.stages.stop import StopFlag

    run = prepared(place.file)

    def listen(event: dict[str, Any]) -> None:
        if event["stage"] == "shout" and event.get("done") == count:
            raise Killed

    events = Events(run.output_dir / "logs" / "events.jsonl", (listen,))
    with pytest.raises(Killed):
        Apply(run, events, StopFlag(), None, "").run()
    events.close()


@pytest.fixture
def done(shouted: Place, tmp_path: Path) -> Place:
    shutil.copytree(shouted.folder, tmp_path / "done", symlinks=True)
    return Place(tmp_path / "done")


def test_a_killed_run_ends_as_one_that_was_not(done: Place) -> None:
    plan = planned(done.file)
    assert not plan.pending
    assert summaries(plan)["shout"] == "all 10 captions are shouted"
    graph = current_graph(prepared(done.file))
    texts = {item.name: item.text for item in graph.of(TrainInputs).items}
    own = {item.name: item.text for item in prepared(done.file).collection.items}
    assert texts == {name: text.upper() + "!" for name, text in own.items()}
    log = (done.output / "logs" / "events.jsonl").read_text()
    assert "train is known now: train 6 steps" in log, "it was planned again when the captions were there"
    assert "<h2>Shouted captions</h2>" in _plain(done) or "Shouted captions" in _plain(done)
    assert "10 captions" in _plain(done)


def _plain(place: Place) -> str:
    return (place.output / "report.html").read_text()


def test_an_edited_caption_goes_through_it(done: Place) -> None:
    name = prepared(done.file).collection.items[0].name
    (done.folder / name).with_suffix(".txt").write_text("something else")
    plan = planned(done.file)
    assert plan.actions["shout"].reasons == [f"1 caption edited ({name})"]
    assert actions(plan)["cache.latents"] == "="
    assert summaries(plan)["train"] == AFTER
    with pytest.raises(UsageError, match=r"^after shout it is known that this would train anew, and 6 trained steps"):
        _apply_unasked(done)
    plan = planned(done.file)
    assert plan.actions["cache.text"].summary.startswith("encode 1 of ")
    assert plan.throws_away == "6 trained steps of run 't'"
    outcome = applied(done.file)
    assert outcome.published
    store = find_store(done.folder)
    kinds = {entry.kind for entry in collect_garbage(store).entries}
    assert {"artifacts: shout", "artifacts: train", "items: text"} <= kinds
    delete_garbage(store, collect_garbage(store))
    assert not planned(done.file).pending


def _apply_unasked(place: Place) -> None:
    from runner.core.events import Events
    from runner.execute.apply import Apply
    from runner.stages.stop import StopFlag

    run = prepared(place.file)
    events = Events(run.output_dir / "logs" / "events.jsonl")
    try:
        Apply(run, events, StopFlag(), None, "", agreed=False).run()
    finally:
        events.close()


def test_another_way_to_shout_is_a_reason(done: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shout, "mark", "?")
    assert planned(done.file).actions["shout"].reasons == []
    with pytest.raises(UsageError):
        _apply_unasked(done)
    log = (done.output / "logs" / "events.jsonl").read_text()
    assert "train is known now: train 6 steps anew, because shout makes something else of them" in log


def test_gc_keeps_what_it_made(done: Place) -> None:
    assert collect_garbage(find_store(done.folder)).entries == []


def test_target_and_status(place: Place, verb: Verbs) -> None:
    refused = verb(place, "apply", "--target", "whisper")
    assert refused.code == 64
    assert "'shout'" in refused.err
    verb(place, "apply", "--target", "shout").ok()
    plan = planned(place.file, "training.max_train_steps=4")
    assert summaries(plan)["train"] == "train 4 steps"
    assert actions(planned(place.file)) == {**dict.fromkeys(actions(plan), "+"), "cache.latents": "=", "shout": "="}
    (place.folder / "pics" / "0.txt").write_text("again")
    _stop_while_shouting(place)
    store = find_store(place.folder)
    ((_, record),) = store.registry()[0]
    found = status_of(store, record)
    assert (found["state"], found["stage"], found["reason"]) == ("stopped", "shout", None)


def _stop_while_shouting(place: Place) -> None:
    from runner.core.events import Events
    from runner.execute.apply import Apply
    from runner.stages.stop import StopFlag

    run, stop = prepared(place.file), StopFlag()

    def listen(event: dict[str, Any]) -> None:
        if event.get("done") == 2:
            stop.set(Exit.TERMINATED)

    events = Events(run.output_dir / "logs" / "events.jsonl", (listen,))
    with pytest.raises(Stopped, match="stopped while shouting"):
        Apply(run, events, stop, "shout", "").run()
    events.close()


# --- names ------------------------------------------------------------------------------------------------------------

OWN = {
    "cache.latents": ["runner/plan/stages/cache.py"],
    "cache.text": ["runner/plan/stages/cache.py"],
    "cache": ["runner/plan/stages/cache.py"],
    "train": ["runner/plan/stages/train.py", "runner/stages/train.py"],
    "sample": ["runner/plan/stages/sample.py"],
    "select": ["runner/plan/stages/select.py", "runner/stages/select.py", "runner/store/artifacts.py"],
    "publish": ["runner/plan/stages/publish.py"],
}
"""Stage → its entry, and what belongs to it alone."""
OTHER_MEANINGS = {
    ("runner/cli/main.py", "sample"): "a verb",
    ("runner/cli/main.py", "select"): "a verb",
    ("runner/config/crosscheck.py", "publish"): "a key of run.toml",
    ("runner/plan/places.py", "publish"): "a key of run.toml",
    ("runner/stages/encode.py", "sample"): "a value of caching.latent_draw",
    ("runner/inputs/cache.py", "sample"): "a value of caching.latent_draw",
    ("runner/stages/previews.py", "sample"): "an event",
    ("runner/dataset/folders.py", "sample"): "a field of ClipOptions",
    ("runner/store/run_folder.py", "train"): "a key of pin.json",
}
MEMORY = "runner/families/"
"""Phases of a family's model of memory are called as the stages."""


def _texts(file: Path) -> Iterator[str]:
    tree = ast.parse(file.read_text())
    docstrings = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_no_stage_is_named_outside_of_its_entry() -> None:
    assert set(OWN) - {"cache"} == set(get_args(DeclaredStage))
    found = []
    for file in sorted((ROOT / "runner").rglob("*.py")):
        path = file.relative_to(ROOT).as_posix()
        for text in _texts(file):
            allowed = path in OWN.get(text, [path]) or (path, text) in OTHER_MEANINGS or path.startswith(MEMORY)
            if not allowed:
                found.append(f"{path}: {text}")
    assert found == []
    unused = [entry for entry in OTHER_MEANINGS if entry[1] not in set(_texts(ROOT / entry[0]))]
    assert unused == []


def test_the_graph_is_asked_for_no_stage_by_attribute() -> None:
    assert not {"train", "sample", "select", "publish", "latents", "texts"} & set(dir(Graph))
