"""Regularization pictures: each gets its turn, through the epochs, and every epoch has as many batches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from runner.dataset.order import Cycle, Group, Use, epoch_batches, group_items, make_cycle
from runner.inputs.train import TrainInputs
from runner.plan.compile import compile_graph
from runner.stages.loader import Sources, StepLoader
from tests.inprocess import planned, prepared, stopped_anew, trained_bytes
from tests.support import Place, draw_pictures

# --- the order of an epoch --------------------------------------------------------------------------------------------


@given(
    training=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    regular=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    batch=st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_each_gets_its_turn_and_every_epoch_has_as_many_batches(
    training: list[int], regular: list[int], batch: int
) -> None:
    """The numbers are the buckets of the items; a use of a training item for each of a regularization item."""
    places = [*training, *regular]
    turning = list(range(len(training), len(places)))
    sizes = [(64 + 8 * place, 64) for place in places]
    groups = group_items(sizes, [batch] * len(places), [1] * len(places), range(len(places)), (), set(turning))
    groups, cycle = make_cycle(groups, turning, len(training))
    bucket_of = {item: sizes[item] for item in range(len(places))}
    seen: Counter[int] = Counter()
    numbers: set[Use] = set()
    for epoch in range(7):
        batches = epoch_batches(groups, 5, epoch, cycle)
        assert batches == epoch_batches(groups, 5, epoch, cycle)
        assert len(batches) == cycle.batches
        uses = [use for one in batches for use in one]
        own = [use for use in uses if use.item >= len(training)]
        assert sorted(use.item for use in uses if use.item < len(training)) == list(range(len(training)))
        assert len(own) == len(training)
        for one in batches:
            assert 1 <= len(one) <= batch
            assert len({bucket_of[use.item] for use in one}) == 1
        assert not numbers & set(own), "no use of an item comes again"
        numbers |= set(own)
        seen.update(use.item for use in own)
        assert max(seen.values()) - min(seen[item] for item in turning) <= 1
    largest = max(len(one) for epoch in range(cycle.epochs) for one in epoch_batches(groups, 5, epoch, cycle))
    assert max(group.largest_batch for group in groups) >= largest


def test_a_very_long_cycle_begins_anew_without_using_a_number_twice() -> None:
    groups = [
        Group(
            bucket=(64, 64),
            batch_size=2,
            uses=(Use(0, 0), Use(1, 0), Use(2, 0)),
            layout="",
            cycled=tuple(range(3, 1004)),
        )
    ]
    groups, cycle = make_cycle(groups, list(range(3, 1004)), 3)
    assert cycle.epochs == 1000
    short = Cycle(items=cycle.items[:4], groups=cycle.groups[:4], turns=3, epochs=2, batches=3)
    uses = [use for epoch in range(8) for _, use in short.uses(epoch)]
    assert len(set(uses)) == len(uses)


# --- in a run ---------------------------------------------------------------------------------------------------------


def uses_of(place: Place, epochs: int, **changes: Any) -> list[Counter[str]]:
    """Name of each regularization item → its uses, in each epoch, as the loader makes them."""
    run = prepared(place.write(changes))
    inputs = compile_graph(run).of(TrainInputs)
    loader = StepLoader(
        inputs,
        Sources(
            latents=None,
            latent_key=lambda d, v: "",
            latent_shape=lambda s: (4, 16, 16),
            texts=None,
            text_key=lambda t: "",
            learned=lambda item, view, row: {},
        ),
        0,
    )
    steps = loader.steps_from(0)
    regular = {item.name for item in run.collection.items if item.settings.regularization}
    return [
        Counter(
            name
            for _ in range(run.length.steps_per_epoch)
            for batch in next(steps)
            for name in batch.names
            if name in regular
        )
        for _ in range(epochs)
    ]


def test_28_for_16_all_get_their_turn(place: Place) -> None:
    draw_pictures(place.folder / "train", 16, seed=21)
    draw_pictures(place.folder / "reg", 28, seed=22)
    sources = [{"path": "train"}, {"path": "reg", "regularization": True}]
    found = uses_of(place, 7, dataset={"held_out": None, "sources": sources})
    assert [sum(epoch.values()) for epoch in found] == [16] * 7
    assert found[0].keys() & found[1].keys() != found[0].keys()
    assert set(sum(found[:2], Counter())) == {f"reg/{n}.png" for n in range(28)}
    assert set(sum(found, Counter()).values()) == {4}, "7 epochs of 16 are 4 of each of the 28"
    run = prepared(place.file)
    assert [note for note in run.dataset_notes.render() if "regularization" in note] == [
        "16 of 28 regularization items are used in the first epoch, the others in those after it; all have had a turn "
        "after 2 epochs; more repeats of the training sources bring more an epoch"
    ]
    assert sum(item.repeats for item in run.collection.items if item.settings.regularization) == 16


def test_two_datasets_of_ten_that_name_the_same_twenty(place: Place) -> None:
    for name, seed in (("a", 31), ("b", 32)):
        draw_pictures(place.folder / name, 10, seed=seed)
    draw_pictures(place.folder / "reg", 20, seed=33)
    text = '[general]\ncaption_extension = ".txt"\n'
    for name in ("a", "b"):
        text += f'[[datasets]]\nresolution = 32\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = "{name}"\n'
        text += '[[datasets.subsets]]\nimage_dir = "reg"\nis_reg = true\n'
    (place.folder / "dataset.toml").write_text(text)
    changes = {"batch_size": None, "held_out": None, "sources": None, "config_file": "dataset.toml"}
    found = uses_of(place, 2, dataset=changes)
    assert found == [Counter({f"reg/{n}.png": 1 for n in range(20)})] * 2
    run = prepared(place.file)
    assert len(run.collection.items) == 40
    notes = [note for note in run.dataset_notes.render() if "regularization" in note]
    assert len(notes) == 1
    assert notes[0].startswith(
        "20 regularization pictures are named again, with the same settings, and count once (reg/"
    )
    # With other settings they are others, and each picture still has its turn before any has its next.
    (place.folder / "dataset.toml").write_text(text.replace("batch_size = 2", "batch_size = 3", 1))
    first, second = uses_of(place, 2, dataset=changes)
    assert first == second == Counter({f"reg/{n}.png": 1 for n in range(20)})
    collection = prepared(place.file).collection
    assert collection.cycle is not None
    of_epoch = [collection.items[use.item].settings.batch_size for _, use in collection.cycle.uses(0)]
    assert Counter(of_epoch) == {2: 10, 3: 10}, "each dataset has its share"


def odd(folder: Path, count: int) -> None:
    """Pictures of three buckets."""
    folder.mkdir()
    for number in range(count):
        size = [(32, 32), (64, 20), (20, 64)][number % 3]
        Image.new("RGB", size, (number * 7, 90, 200 - number)).save(folder / f"{number}.png")


def test_buckets_that_vary_make_no_other_number_of_steps(place: Place) -> None:
    odd(place.folder / "reg", 11)
    sources = [{"path": "pics"}, {"path": "reg", "class_tokens": "thing", "regularization": True}]
    changes = {
        "dataset": {"held_out": None, "batch_size": 4, "sources": sources},
        "training": {"max_train_steps": None, "max_train_epochs": 11},
    }
    found = uses_of(place, 11, **changes)
    assert [sum(epoch.values()) for epoch in found] == [10] * 11
    assert set(sum(found, Counter()).values()) == {10}
    run = prepared(place.file)
    assert run.length.steps == 11 * run.length.steps_per_epoch
    figures = planned(place.file)
    assert len(figures.graph.of(TrainInputs).items) == 21


@pytest.mark.parametrize("at", [3, 8])
def test_a_resume_ends_in_the_same_bytes(place: Place, at: int) -> None:
    odd(place.folder / "reg", 11)
    sources = [{"path": "pics", "repeats": 1}, {"path": "reg", "class_tokens": "thing", "regularization": True}]
    place.write(
        {
            "dataset": {"held_out": None, "batch_size": 4, "random_crop": True, "sources": sources},
            "training": {"max_train_steps": 12},
        }
    )
    whole = trained_bytes(place.file)
    stopped_anew(place, at)
    assert trained_bytes(place.file) == whole
