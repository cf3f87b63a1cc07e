"""A tokenizer's files may hold anything: named when planning or when loading, never counted with, never run."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import RunFailed
from runner.families.hunyuan_video.tiny import write_llama_tokenizer
from runner.families.parts.text import load_tokenizers
from runner.families.parts.tiny import write_clip_tokenizer, write_t5_tokenizer
from runner.families.parts.tokenizer_fit import misfit
from runner.families.parts.tokenizer_kinds import clip_tokenizer, llama_3_tokenizer, t5_tokenizer
from runner.families.token_counts import NoTokenizer, count_tokens
from runner.model.model import Model, ModelProblem
from tests.fuzzing import bounded, fuzz, read_or_refused

WRITERS: dict[str, Callable[[Path], Any]] = {
    "clip": write_clip_tokenizer,
    "t5": write_t5_tokenizer,
    "llama": write_llama_tokenizer,
}
KINDS = {
    "clip": clip_tokenizer({"vocab_size": 514}),
    "t5": t5_tokenizer({"vocab_size": 98}),
    "llama": llama_3_tokenizer({"vocab_size": 269}),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("tokenizers")
    for name, write in WRITERS.items():
        write(parent / name)
    return parent


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "own")
    return tmp_path / "own"


def loaded(folder: Path, kind: str) -> Any:
    component = SimpleNamespace(tokenizer=KINDS[kind])
    model = SimpleNamespace(
        text_encoders=("text_encoder_1",),
        tokenizers={"text_encoder_1": folder},
        components={"text_encoder_1": component},
    )
    return load_tokenizers(cast(Model, model), {})


def changed(file: Path, *path: str | int, value: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    node = content
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), None),
        (("added_tokens", 1), 5),
        (("added_tokens", 1), []),
        (("added_tokens", 0, "id"), []),
        (("added_tokens", 0, "special"), 7),
        (("model", "merges"), ["a b c"]),
        (("model",), []),
    ],
)
def test_what_the_libraries_raise_becomes_words(folder: Path, path: tuple[str | int, ...], value: Any) -> None:
    changed(folder / "clip" / "tokenizer.json", *path, value=value)
    with bounded(), pytest.raises(RunFailed) as caught:
        loaded(folder / "clip", "clip")
    assert str(caught.value).startswith(f"the tokenizer in {folder / 'clip'} cannot be loaded: ")
    assert caught.value.diagnostics[0].hint == "copy or download its folder again"


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_brings_no_program(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto_map` names a module that transformers would ask to run."""
    own = folder / kind
    (own / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Mine: pass\n")
    changed(own / "tokenizer_config.json", "auto_map", value={"AutoTokenizer": ["mine.Mine", "mine.Mine"]})
    changed(own / "tokenizer_config.json", "tokenizer_class", value="Mine")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    with bounded(20):
        try:
            loaded(own, kind)
        except RunFailed as error:
            assert "cannot be loaded" in str(error)  # noqa: PT017 - either is well
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("content", [b"foo bar\n", b"\xff", b"\0 \0", b"a b\n" * 100_000])
def test_merges_of_what_is_no_vocabulary(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "merges.txt"
    file.write_bytes(content)
    with bounded():
        try:
            assert len(count_tokens(file, ["a photo"])) == 1
        except NoTokenizer as error:
            assert str(error)  # noqa: PT017 - either is well


@pytest.mark.parametrize(
    "vocabulary", [{"a": 1e999}, {"a": []}, {"a": "x"}, 5, [[]], [5], {"a": 10**5000}, {"a": None}]
)
def test_a_vocabulary_of_no_numbers(folder: Path, vocabulary: Any) -> None:
    file = folder / "t5" / "tokenizer.json"
    text = json.dumps({"model": {"vocab": "HERE"}}).replace('"HERE"', _dumped(vocabulary))
    file.write_text(text)
    with bounded(), pytest.raises(ModelProblem, match=r"its vocabulary cannot be read|more than 4,300 digits"):
        misfit(folder / "t5", KINDS["t5"])


def _dumped(value: Any) -> str:
    return '{"a": ' + "1" * 5001 + "}" if value == {"a": 10**5000} else json.dumps(value)


def places(node: Any, here: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths to all that is in a document, of long tables and lists the beginning."""
    if here:
        yield here
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in list(inner)[:8]:
        yield from places(value, (*here, name))


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@given(kind=st.sampled_from(list(KINDS)), at=st.integers(0, 10**6), value=ANY)
@fuzz(40)
def test_any_tokenizer(folder: Path, sound: Path, kind: str, at: int, value: Any) -> None:
    """Its size and words, its counts, and what training loads."""
    own = folder / kind
    content = json.loads((sound / kind / "tokenizer.json").read_text(encoding="utf-8"))
    every = list(places(content))
    damaged = copy.deepcopy(content)
    node = damaged
    path = every[at % len(every)]
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    (own / "tokenizer.json").write_text(json.dumps(damaged), encoding="utf-8")
    read_or_refused(lambda: misfit(own, KINDS[kind]), ModelProblem)
    read_or_refused(lambda: count_tokens(own / "tokenizer.json", ["a photo of a cat, é日本"]), NoTokenizer)
    read_or_refused(lambda: loaded(own, kind))
