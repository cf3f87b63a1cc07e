"""Every key of run.toml has bounds, and a run that nobody could carry out is refused when it is planned."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest

from runner.config.schema import all_keys
from runner.dataset.collect import MOST_USES
from runner.plan.resolve import MOST_CHECKPOINTS, MOST_SAMPLES
from tests.fuzzing import bounded
from tests.support import Place
from tests.test_config import MINIMAL, prepared_errors

CHECKED_ELSEWHERE = {"training.optimizer.args", "training.scheduler.args"}
"""Their values are compared with a class's signature, or with the schedule's own table."""
PATTERNED = {"run.name", "run.device"}
"""The pattern bounds the length."""


def unbounded(annotation: Any, metadata: tuple[Any, ...], where: str) -> Iterator[str]:
    """Each part of a type that has no upper bound."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extra = get_args(annotation)
        yield from unbounded(inner, (*extra, *metadata), where)
    elif origin in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from unbounded(part, metadata, where)
    elif origin in (list, dict):
        if not limits(metadata) & {"max_length"}:
            yield f"{where}: {origin.__name__} of any length"
        for part in get_args(annotation):
            yield from unbounded(part, (), f"{where}[]")
    elif annotation in (int, float) and not limits(metadata) & {"le", "lt"}:
        yield f"{where}: {annotation.__name__} of any size"
    elif annotation is str and not limits(metadata) & {"max_length", "func"}:
        yield f"{where}: text of any length"
    else:
        assert origin is Literal or isinstance(annotation, type), where


def limits(metadata: tuple[Any, ...]) -> set[str]:
    found = set()
    for item in metadata:
        for one in getattr(item, "metadata", None) or [item]:
            found |= {name for name in ("le", "lt", "max_length", "func") if getattr(one, name, None) is not None}
    return found


def test_every_key_has_bounds() -> None:
    found = []
    for key in all_keys().values():
        if key.section is None or key.is_array_of_tables:
            found += list(unbounded(key.field.annotation, tuple(key.field.metadata), key.dotted))
    own = [line for line in found if line.partition(":")[0].rstrip("[]") not in CHECKED_ELSEWHERE | PATTERNED]
    assert not own
    assert len(found) > len(own)  # the walk sees what has none


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"training": {"max_train_steps": 10**12}},
            "`training.max_train_steps` must be an integer from 1 to 10,000,000",
        ),
        (
            {"dataset": {"sources": [{"path": "pics", "repeats": 2**31}]}},
            "`dataset.sources.repeats` must be an integer from 1 to 1,000,000",
        ),
        (
            {"dataset": {"sources": [{"path": "pics", "repeats": 1_000_000}]}},
            f"an epoch would use its items 8,000,000 times; {MOST_USES:,} are the most",
        ),
        (
            {"training": {"max_train_steps": None, "max_train_epochs": 10_000_000}},
            "10,000,000 epochs of 4 steps are 40,000,000 steps; 10,000,000 are the most",
        ),
        (
            {"training": {"max_train_steps": 10_000_000, "checkpoints": {"every_n_steps": 1}}},
            f"this would save 10,000,000 checkpoints; {MOST_CHECKPOINTS:,} are the most",
        ),
        (
            {
                "training": {"max_train_steps": 10_000_000, "checkpoints": {"every_n_steps": 1000}},
                "sampling": {"prompts": [{"prompt": str(n)} for n in range(11)]},
            },
            f"10,000 checkpoints of 11 prompts would make 110,000 samples; {MOST_SAMPLES:,} are the most",
        ),
    ],
)
def test_a_run_without_end_is_refused(place: Place, changes: dict[str, Any], message: str) -> None:
    with bounded(10):
        assert message in prepared_errors(place, place.write(changes).read_text(encoding="utf-8"))


def test_a_folder_of_endless_repeats(place: Place) -> None:
    (place.folder / "pics").rename(place.folder / "999999999_cat")
    text = place.write({"dataset": {"sources": [{"path": "999999999_cat"}]}}).read_text(encoding="utf-8")
    with bounded(10):
        assert "an epoch would use its items" in prepared_errors(place, text)


def test_a_key_with_too_long_a_text(place: Place) -> None:
    found = prepared_errors(place, MINIMAL.replace('name = "t"', 'name = "t"\noutput_dir = "' + "x" * 300 + '"'))
    assert found.startswith("error: `run.output_dir`: a path has at most 4,000 bytes, and 255 in each of its parts\n")
    text = MINIMAL + '[[sampling.prompts]]\nprompt = "' + "x" * 20_001 + '"\n'
    assert prepared_errors(place, text).startswith(
        "error: `sampling.prompts.prompt` has 20,001 characters; 20,000 are the most\n"
    )
    text = MINIMAL + "[network]\ntargets = [" + '"a",' * 1001 + "]\n"
    assert prepared_errors(place, text).startswith("error: `network.targets` has 1,001 entries; 1,000 are the most\n")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("a\0b", "has a control character in it"),
        ("a\nb", "has a control character in it"),
        ("{step:1000000000}", "has a field with a format that is not known"),
        ("{step:{step}}", "has a field with a format that is not known"),
        ("{step:013}", "has a field with a format that is not known"),
        ("{weights:09}", "has a field with a format that is not known"),
        ("{name!r}", "has a field with a format that is not known"),
        ("{name.__class__}", "has a field that is not known"),
        ("{name[0]}", "has a field that is not known"),
        ("{}", "has a field that is not known"),
        ("{epoch}", "has a field that is not known"),
        ("{", "cannot be read: Single '{' encountered in format string"),
        ("..", "would be a folder's name"),
        ("ä" * 150, "makes a name of 300 bytes; 200 are the most"),
        ("{name}" * 20, "makes a name of 2000 bytes; 200 are the most"),
    ],
)
def test_names_of_published_files_are_checked_when_planning(place: Place, name: str, problem: str) -> None:
    own = "n" * 100 if name == "{name}" * 20 else "t"
    changes = {"run": {"name": own}, "selection": {"publish": [{"directory": "out", "name": name}]}}
    found = prepared_errors(place, place.write(changes).read_text(encoding="utf-8"))
    assert found.startswith(f"error: `name` {name!r} {problem}\n")
    assert found.endswith("hint: fields are {name}, {step} and {weights}; {step:08} has at least eight digits")


def test_names_of_published_files_that_are_right(place: Place) -> None:
    from tests.inprocess import prepared

    for name in ("{name}-{step:08d}", "x{{{step}}}", "{step:04}-{weights}", "Katze ä"):
        prepared(place.write({"selection": {"publish": [{"directory": "out", "name": name}]}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"run": {"output_dir": "pics/out"}},
            "~/pics/out lies in the source ~/pics: what is written there would be read by the next plan",
        ),
        (
            {"run": {"output_dir": "pics"}},
            "~/pics lies in the source ~/pics: what is written there would be read by the next plan",
        ),
        (
            {"run": {"output_dir": "link/out"}},
            "~/link/out lies in the source ~/pics: what is written there would be read by the next plan",
        ),
        ({"run": {"output_dir": "."}}, "the source ~/pics lies in the run's folder ~"),
        ({"run": {"output_dir": ".runner/runs"}}, "~/.runner/runs lies in the store ~/.runner"),
        ({"run": {"output_dir": ".runner"}}, "~/.runner lies in the store ~/.runner"),
        ({"run": {"output_dir": "/"}}, "/ is no folder for a run alone"),
        ({"run": {"output_dir": "~"}}, "is no folder for a run alone"),
        (
            {"selection": {"publish": [{"directory": "pics/out"}]}},
            "~/pics/out lies in the source ~/pics: what is written there would be read by the next plan",
        ),
        (
            {"dataset": {"held_out": {"count": None, "path": "apart"}}, "run": {"output_dir": "apart/out"}},
            "~/apart/out lies in the source ~/apart: what is written there would be read by the next plan",
        ),
    ],
)
def test_what_a_run_writes_does_not_lie_among_what_it_reads(
    place: Place, changes: dict[str, Any], message: str
) -> None:
    import shutil

    (place.folder / "link").symlink_to(place.folder / "pics")
    shutil.copytree(place.folder / "pics", place.folder / "apart")
    assert message in prepared_errors(place, place.write(changes).read_text(encoding="utf-8"))
