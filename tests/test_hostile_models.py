"""A model's folder whose configurations lie: named when planning, and never counted with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.config.load import load
from runner.families.locate import locate_model
from runner.families.parts.files import BUILTIN, CHECKPOINT
from runner.families.registry import family_spec
from runner.model.model import ModelProblem
from tests.fuzzing import bounded, fuzz, read_or_refused
from tests.support import Place
from tests.test_files import special

CONFIGS = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "model_index.json",
)


def inspected(place: Place) -> Any:
    config = load(place.file).require()
    return family_spec(config.model.family).read(config, place.folder)


def refusal(place: Place) -> str:
    with bounded(5), pytest.raises(ModelProblem) as caught:
        inspected(place)
    return str(caught.value).replace(str(place.folder), "~")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[]", "holds no table"),
        (b"[" * 100_000, "cannot be read: it is nested too deeply"),
        (b'{"x": ' + b"1" * 5000 + b"}", "cannot be read: a number of it has more than 4,300 digits"),
        (b"\xff\xfe", "cannot be read: it is not UTF-8 (byte 0)"),
        (b"", "cannot be read: Expecting value: line 1 column 1 (char 0)"),
    ],
)
def test_configurations_that_are_none(place: Place, name: str, content: bytes, words: str) -> None:
    (place.folder / "model" / name).write_bytes(content)
    assert refusal(place) == f"~/model/{name} {words}"


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        (
            "unet",
            "layers_per_block",
            10**9,
            "the unet is not one of Stable Diffusion 1.5 (layers_per_block is 1000000000)",
        ),
        ("unet", "layers_per_block", 1e999, "the unet is not one of Stable Diffusion 1.5 (layers_per_block is inf)"),
        (
            "unet",
            "block_out_channels",
            [10**10],
            "the unet is not one of Stable Diffusion 1.5 (block_out_channels is [10000000000])",
        ),
        ("unet", "block_out_channels", 5, "the unet is not one of Stable Diffusion 1.5 ("),
        ("unet", "down_block_types", {"a": 1}, "the unet is not one of Stable Diffusion 1.5 ("),
        (
            "text_encoder",
            "num_hidden_layers",
            10**9,
            "the text_encoder is not one of Stable Diffusion 1.5 (num_hidden_layers is 1000000000)",
        ),
        (
            "scheduler",
            "num_train_timesteps",
            10**12,
            "`num_train_timesteps` must be an integer from 2 to 100,000, not 1000000000000",
        ),
        (
            "scheduler",
            "num_train_timesteps",
            True,
            "`num_train_timesteps` must be an integer from 2 to 100,000, not True",
        ),
        ("scheduler", "beta_start", "x", "`beta_start` must be a number between 0 and 1, not x"),
        ("scheduler", "beta_end", 1e999, "`beta_end` must be a number between 0 and 1, not inf"),
        ("scheduler", "beta_schedule", [1], "`beta_schedule` must be linear or scaled_linear, not [1]"),
        ("scheduler", "prediction_type", "sample", "`prediction_type` must be epsilon or v_prediction, not sample"),
        (
            "scheduler",
            "trained_betas",
            [0.1, "x"],
            "`trained_betas` must be a list of numbers between 0 and 1, not [0.1, 'x']",
        ),
    ],
)
def test_configurations_with_values_that_no_model_has(
    place: Place, name: str, key: str, value: Any, words: str
) -> None:
    file = place.folder / "model" / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), key: value}), encoding="utf-8")
    assert words in refusal(place)


@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
@pytest.mark.parametrize("key", ["checkpoint", "vae", "text_encoder_1", "tokenizer_1"])
def test_a_model_is_a_regular_file(place: Place, kind: str, key: str) -> None:
    words = {"pipe": "a named pipe", "device": "a device", "socket": "a socket"}[kind]
    special(place.folder, kind)
    place.write({"model": {key: "special"}})
    assert refusal(place) == f"~/special is {words}, not a file"


@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_the_files_of_a_model_are_regular_ones(place: Place, kind: str) -> None:
    file = place.folder / "model" / "unet" / "config.json"
    file.unlink()
    special(place.folder, kind).rename(file)
    assert "unet/config.json" in refusal(place)


def test_a_hub_reference_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    reference = tmp_path / "models--a--b" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_bytes(b"\xff" * 10)
    with pytest.raises(ModelProblem, match="refs/main cannot be read: it is not UTF-8"):
        locate_model("a/b", tmp_path, None, BUILTIN, CHECKPOINT)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)


@fuzz(60)
@given(st.sampled_from(CONFIGS), st.integers(0, 60), VALUES)
def test_any_configuration(place: Place, name: str, at: int, value: Any) -> None:
    file = place.folder / "model" / name
    before = file.read_bytes()
    content = json.loads(before)
    keys = sorted(content)
    content[keys[at % len(keys)]] = value
    file.write_text(json.dumps(content), encoding="utf-8")
    try:
        model = read_or_refused(lambda: inspected(place), ModelProblem)
        if model is not None:
            config = load(place.file).require()
            read_or_refused(lambda: family_spec("sd15").targets(config, model), ModelProblem)
    finally:
        file.write_bytes(before)


def test_a_folder_that_may_not_be_entered(tmp_path: Path) -> None:
    """A path behind it does not exist for us; asking for it does not fail."""
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0)
    try:
        if os.access(closed, os.X_OK):
            pytest.skip("this user may enter every folder")
        with pytest.raises(ModelProblem, match="there is no file or folder"):
            locate_model("closed/x", tmp_path, None, BUILTIN, CHECKPOINT)
    finally:
        closed.chmod(0o700)
