"""A family of another package is found by its entry point and goes all the way: schema, plan, training, samples, export."""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from runner import registry
from runner.config import schema
from runner.errors import Invalid, InvalidConfig
from runner.facts import leaves
from runner.families.identify import Kind, identify
from tests.inprocess import Verbs, actions, applied, planned, prepared, stopped_anew, trained_bytes, verb  # noqa: F401
from tests.support import DATA, ROOT, Place, draw_pictures, merged

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
    second = place.folder / "model" / "unet_2"
    if not second.exists():
        shutil.copytree(place.folder / "model" / "unet", second)
    prompts = [{"prompt": "a red circle", "seed": 5, **prompt}]
    training = {"max_train_steps": 4, "checkpoints": {"every_n_steps": 4, "state_every_n_steps": 1}}
    return place.write({"model": {"family": "made_up"}, "training": training, "sampling": {"prompts": prompts}})


@pytest.mark.usefixtures("installed")
def test_it_trains_resumes_samples_and_is_chosen(place: Place) -> None:
    outcome = applied(glowing(place, glow=2.0))
    assert outcome.published
    assert set(actions(planned(place.file)).values()) == {"="}
    plan = planned(glowing(place, glow=3.0))
    assert plan.actions["sample"].reasons == ["sampling.prompts[0].glow 2.0 → 3.0"]
    assert plan.actions["train"].symbol == "="
    picture = place.output / "samples" / "step-00000004-prompt-01.png"
    first, calm = picture.read_bytes(), trained_bytes(place.file)
    applied(place.file)
    assert picture.read_bytes() != first, "the glow shows in the picture"
    stopped_anew(place, 1)
    assert trained_bytes(place.file) == calm


@pytest.mark.usefixtures("installed")
def test_its_keys_stand_in_the_schema(place: Place, verb: Verbs) -> None:  # noqa: F811
    glowing(place)
    described = json.loads(verb(place, "schema").ok().out)
    assert "made_up" in described["$defs"]["Model"]["properties"]["family"]["enum"]
    variants = described["$defs"]["Model"]["properties"]["variant"]["anyOf"]
    assert {"soft", "hard", "dev"} <= {name for part in variants for name in part.get("enum", [])}
    assert described["$defs"]["Prompt"]["properties"]["glow"]["description"].startswith("How much the picture glows")
    assert "How much the picture glows" in verb(place, "explain", "sampling.prompts.glow").ok().out
    for table in ("Source", "HeldOut"):
        assert described["$defs"][table]["properties"]["brightness"]["description"].startswith("How bright")
    assert "How bright the pictures" in verb(place, "explain", "dataset.sources.brightness").ok().out


def bright(place: Place, brightness: float | None, **changes: Any) -> Path:
    """A glowing run with a source of such brightness."""
    source = {"path": "pics"} if brightness is None else {"path": "pics", "brightness": brightness}
    glowing(place)
    place.base = merged(place.base, {"model": {"family": "made_up"}, "training": {"max_train_steps": 2}})
    return place.write(merged({"dataset": {"sources": [source]}}, changes))


@pytest.mark.usefixtures("installed")
def test_its_key_of_sources_is_trained_and_measured_with(place: Place) -> None:
    applied(bright(place, 2.0))
    first, measured = trained_bytes(place.file), base_loss(place)
    plan = planned(bright(place, 4.0))
    facts = dict(leaves(plan.graph.nodes["train"].facts))
    assert facts["items.part.brightness"].origin == ("dataset.**.brightness", "dataset.config_file")
    assert plan.actions["train"].reasons == ["dataset.sources[0].brightness 2.0 → 4.0"]
    assert plan.actions["cache.latents"].symbol == "="
    assert planned(bright(place, 2.0)).actions["train"].symbol == "="
    assert planned(bright(place, None)).actions["train"].reasons == ["dataset.sources[0].brightness 2.0 → unset"]
    applied(bright(place, 4.0))
    assert trained_bytes(place.file) != first
    assert base_loss(place) != measured, "the same model is measured under it"
    calm = load(trained_bytes(place.file))
    shutil.rmtree(place.folder / ".runner")
    found = load(trained_bytes(bright(place, 4.0, caching={"latents": "off", "text": "off"})))
    assert all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in calm.items()), "encoded at each use"


def base_loss(place: Place) -> float:
    """What was measured of the base model."""
    return float(json.loads((place.output / "selection.json").read_text())["base"]["stable_loss"])


@pytest.mark.usefixtures("installed")
def test_held_out_items_have_its_key_of_their_own_or_their_sources(place: Place) -> None:
    draw_pictures(place.folder / "apart", 2, seed=5)
    for given, found in (({}, 2.0), ({"brightness": 3.0}, 3.0)):
        bright(place, 2.0, dataset={"held_out": {"count": None, "path": "apart", **given}})
        collection = prepared(place.file).collection
        assert {item.own.brightness for item in collection.held_out} == {found}
        assert {item.own.brightness for item in collection.items} == {2.0}


@pytest.mark.usefixtures("installed")
def test_its_key_is_refused_in_other_families(place: Place) -> None:
    schema.everything()
    place.write({"sampling": {"prompts": [{"prompt": "a", "glow": 1.0}]}})
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.file)
    assert [item.message for item in caught.value.diagnostics] == [
        "prompt 1: family sd15 cannot use `glow`: it belongs to Made-up"
    ]
    place.write({"dataset": {"sources": [{"path": "pics", "brightness": 2.0}]}})
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.file)
    assert [(item.message, item.places[0].line) for item in caught.value.diagnostics] == [
        (
            "family sd15 cannot use `brightness`: it belongs to Made-up",
            1 + place.file.read_text().splitlines().index("brightness = 2.0"),
        )
    ]


@pytest.mark.usefixtures("installed")
def test_another_tools_name_of_it_is_a_hint(place: Place) -> None:
    place.write({"model": {"family": "glowing"}})
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.file)
    assert caught.value.diagnostics[0].hint == 'here: "made_up"'


@pytest.mark.usefixtures("installed")
def test_its_files_are_told_from_those_of_a_built_in_family() -> None:
    """Which has the same keys and does not know its mark."""
    keys = json.loads((DATA / "checkpoint_sd15_keys.json").read_text(encoding="utf-8"))
    tensors = {key: ("F16", tuple(shape)) for key, shape in keys.items()}
    assert identify(tensors) == Kind("a Stable Diffusion 1.5 checkpoint", "sd15")
    assert identify({**tensors, "made_up.mark": ("F16", (1,))}) == Kind("a made-up checkpoint", "made_up")


@pytest.mark.usefixtures("installed")
def test_its_variants_are_its_own(place: Place) -> None:
    glowing(place)
    assert prepared(place.file, 'model.variant="soft"').model.variant == "soft"
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.file, 'model.variant="kontext"')
    assert caught.value.diagnostics[0].message == 'family made_up has no variant "kontext"'


@pytest.mark.usefixtures("installed")
def test_a_name_that_is_taken_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "other-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n", encoding="utf-8")
    (folder / "entry_points.txt").write_text("[runner.families]\nsd15 = other.spec:OTHER\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(Invalid) as caught:
        registry.installed()
    (finding,) = caught.value.diagnostics
    assert finding.message == "the family 'sd15' of the package other has the name of another one"
    assert finding.hint == "uninstall one of them: pip uninstall other"


def test_without_the_package_it_is_no_family(place: Place) -> None:
    glowing(place)
    with pytest.raises(InvalidConfig, match=r"`model\.family` must be"):
        prepared(place.file)


NAMED_ELSEWHERE = {
    "runner/registry.py": "where they are",
    "runner/config/prompt_options.py": "FramePack's own program has a dialect of prompts",
    "runner/config/foreign.py": "flags of other tools' scripts",
    "runner/cli/sample.py": "the option --one-frame",
}
"""File → why a built-in family's name stands in it, outside of families/."""


def test_no_family_is_named_outside_its_folder() -> None:
    found = set()
    for file in sorted((ROOT / "runner").rglob("*.py")):
        relative = file.relative_to(ROOT).as_posix()
        if relative.startswith("runner/families/"):
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        for node in ast.walk(tree):
            words = [node.value] if isinstance(node, ast.Constant) and id(node) not in texts else []
            words += [node.module] if isinstance(node, ast.ImportFrom) else []
            for word in words:
                if isinstance(word, str) and set(re.findall(r"\w+", word)) & set(registry.FAMILIES):
                    found.add(relative)
    assert found == set(NAMED_ELSEWHERE)


def test_contributing_walks_through_its_files() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = [
        file.relative_to(ROOT).as_posix()
        for file in PACKAGE.rglob("*")
        if file.is_file() and file.suffix in (".py", ".txt")
    ]
    assert [file for file in files if file not in text] == []
    named = re.findall(r"`((?:runner|schemas|tests|recipes)/[\w/.-]+)`", text)
    assert [name for name in named if "NAME" not in name and not (ROOT / name).exists()] == []
