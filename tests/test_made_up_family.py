"""A family of another package is found by its entry point and goes all the way: schema, plan, training, samples, export."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner import registry
from runner.config import schema
from runner.errors import InvalidConfig
from tests.inprocess import Verbs, actions, applied, planned, prepared, stopped_anew, trained_bytes, verb  # noqa: F401
from tests.support import ROOT, Place

PACKAGE = ROOT / "tests" / "made_up"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package on the path, and nothing remembered of it before or after."""
    monkeypatch.syspath_prepend(str(PACKAGE))
    monkeypatch.setattr(schema, "_known", {})
    registry.installed.cache_clear()
    yield
    registry.installed.cache_clear()
    for name in [name for name in sys.modules if name.startswith("made_up_family")]:
        del sys.modules[name]


def glowing(place: Place, **prompt: object) -> Path:
    prompts = [{"prompt": "a red circle", "seed": 5, **prompt}]
    return place.write({"model": {"family": "made_up"}, "sampling": {"prompts": prompts}})


@pytest.mark.usefixtures("installed")
def test_it_trains_resumes_samples_and_is_chosen(place: Place) -> None:
    calm = trained_bytes(glowing(place, glow=2.0))
    outcome = applied(place.file)
    assert outcome.published
    assert set(actions(planned(place.file)).values()) == {"="}
    picture = next((place.output / "samples").glob("step-00000006*.png"))
    first = picture.read_bytes()
    stopped_anew(place, 3)
    assert trained_bytes(place.file) == calm
    applied(glowing(place))
    assert picture.read_bytes() != first, "the glow shows in the picture"


@pytest.mark.usefixtures("installed")
def test_its_reason_names_its_key(place: Place) -> None:
    applied(glowing(place, glow=2.0))
    plan = planned(glowing(place, glow=3.0))
    assert plan.actions["sample"].reasons == ["sampling.prompts[0].glow 2.0 → 3.0"]
    assert plan.actions["train"].symbol == "="


@pytest.mark.usefixtures("installed")
def test_its_keys_stand_in_the_schema(place: Place, verb: Verbs) -> None:  # noqa: F811
    glowing(place)
    described = json.loads(verb(place, "schema").ok().out)
    assert "made_up" in described["$defs"]["Model"]["properties"]["family"]["enum"]
    assert described["$defs"]["Prompt"]["properties"]["glow"]["description"].startswith("How much the picture glows")
    assert "How much the picture glows" in verb(place, "explain", "sampling.prompts.glow").ok().out


@pytest.mark.usefixtures("installed")
def test_its_key_is_refused_in_other_families(place: Place) -> None:
    schema.everything()
    place.write({"sampling": {"prompts": [{"prompt": "a", "glow": 1.0}]}})
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.file)
    assert [item.message for item in caught.value.diagnostics] == ["prompt 1: family sd15 cannot use `glow`: it belongs to Made-up"]  # fmt: skip


@pytest.mark.usefixtures("installed")
def test_another_tools_name_of_it_is_a_hint(place: Place) -> None:
    place.write({"model": {"family": "glowing"}})
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.file)
    assert caught.value.diagnostics[0].hint == 'here: "made_up"'


def test_without_the_package_it_is_no_family(place: Place) -> None:
    glowing(place)
    with pytest.raises(InvalidConfig, match=r"`model\.family` must be"):
        prepared(place.file)
