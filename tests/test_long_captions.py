"""Captions that are longer than the text encoder takes: counted by the real tokenizers, without torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.families import token_counts
from runner.families.parts.text import _builtin_clip, load_tokenizers
from runner.families.token_counts import NoTokenizer, count_tokens, tokenizer_file
from tests.inprocess import prepared
from tests.support import Place

LONG = ", ".join(f"a{chr(97 + n % 26)}" for n in range(40))


@given(text=st.text(max_size=60) | st.text(st.sampled_from("aZé9 ,.'s\n日本🎉İ<|>"), max_size=60))
@settings(max_examples=60, deadline=None)
def test_clips_tokens_are_those_of_training(text: str) -> None:
    assert count_tokens(None, [text]) == [len(_builtin_clip("<|endoftext|>")(text, add_special_tokens=False).input_ids)]


def test_from_merges_as_in_published_folders(tmp_path: Path) -> None:
    """tokenizer/ of Stable Diffusion 1.5 holds vocab.json and merges.txt."""
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in token_counts.clip_merges())])
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    texts = ["a photo of a corgi, wearing sunglasses", "Ünïcode 123"]
    assert count_tokens(tmp_path / "merges.txt", texts) == count_tokens(None, texts)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"model": {"type": "BPE", "vocab": 3}}', "\x00", "[" * 5000])
def test_a_tokenizer_that_cannot_be_read_says_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(NoTokenizer):
        count_tokens(tmp_path / "tokenizer.json", ["a"])


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "hunyuan_video", "framepack", "flux1", "chroma"])
def test_each_familys_tokens(family_place: Callable[..., Place], name: str) -> None:
    """As many as training's own tokenizer makes, for the encoder and the limit that the family names."""
    run = prepared(family_place(name, dataset={"held_out": None}).file)
    assert run.spec.text_limit is not None
    encoder, limit = run.spec.text_limit(
        run.model, run.config.model.max_token_length or run.spec.defaults.max_token_length
    )
    own = load_tokenizers(run.model, {})[encoder]
    texts = ["a red circle", LONG, "Ünï, code"]
    counted = count_tokens(tokenizer_file(run.model, encoder), texts)
    assert counted == [len(own(text, add_special_tokens=False).input_ids) for text in texts]
    assert (
        limit
        == {"sd15": 75, "sdxl": 75, "sd3": 255, "hunyuan_video": 256, "framepack": 256, "flux1": 511, "chroma": 511}[
            name
        ]
    )


def long_notes(place: Place, **model: Any) -> list[str]:
    run = prepared(place.write({"dataset": {"held_out": None}, "model": model}))
    return [note for note in run.dataset_notes.render() if "longer" in note]


def test_long_captions_are_counted_with_a_hint(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, words in ((2, 20), (4, 60)):
        (place.folder / "pics" / f"{number}.txt").write_text(" ".join(["aaaa"] * words))
    expected = (
        "2 of 10 captions are longer than the {0} tokens that the text encoder takes, and are cut (the longest has 240) "
        "(pics/4.png, pics/2.png); max_token_length = 225 takes up to 225"
    )
    assert long_notes(place) == [expected.format(75)]
    assert long_notes(place, max_token_length=150)[0].startswith("1 of 10 captions is longer than the 150 tokens")
    assert long_notes(place, max_token_length=225) == [
        "1 of 10 captions is longer than the 225 tokens that the text encoder takes, and is cut (the longest has 240) "
        "(pics/4.png); write it shorter, what matters first"
    ]
    monkeypatch.setattr(token_counts, "_load", lambda file: pytest.fail("counted anew"))
    assert long_notes(place) == [expected.format(75)]


def test_the_whole_text_of_a_video_family(family_place: Callable[..., Place]) -> None:
    place = family_place("hunyuan_video")
    (place.folder / "pics" / "2.txt").write_text("short\n" + "aaaa " * 70)
    found = long_notes(place)
    assert len(found) == 1
    assert found[0].startswith("1 of 10 captions is longer than the 256 tokens")
    assert found[0].endswith("(pics/2.png); write it shorter, what matters first")
