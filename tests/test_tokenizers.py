"""A tokenizer is that of its text encoder, of every family and kind of file: said when planning, with its key."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner.errors import InvalidConfig, RunFailed
from runner.families.hunyuan_video.tiny import write_llama_tokenizer
from runner.families.parts.files import CONFIGS, read_json
from runner.families.parts.tiny import write_clip_tokenizer, write_t5_tokenizer
from runner.families.parts.tokenizer_fit import misfit
from runner.families.parts.tokenizer_kinds import clip_tokenizer, llama_3_tokenizer, t5_tokenizer
from runner.families.registry import family
from runner.families.token_counts import NoTokenizer, count_tokens, tokenizer_file
from runner.model.model import TokenizerKind
from tests.inprocess import prepared
from tests.support import Place

Make = Callable[..., Place]
FULL = {"CLIP": "sd15/text_encoder", "T5": "sd3/text_encoder_3", "LLaMA 3": "hunyuan_video/text_encoder"}


KINDS = {"CLIP": clip_tokenizer, "T5": t5_tokenizer, "LLaMA 3": llama_3_tokenizer}


def kind_of(title: str, **changes: Any) -> TokenizerKind:
    return KINDS[title]({**read_json(CONFIGS / FULL[title] / "config.json"), **changes})


def problem(place: Place, changes: dict[str, Any]) -> str:
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.write({"model": changes}))
    found = [finding for finding in caught.value.diagnostics if "tokenizer" in finding.message]
    assert len(found) == 1
    return found[0].render()


@pytest.mark.parametrize(
    ("name", "number", "wrong", "said"),
    [
        ("sd15", 1, "llama", "has 261 tokens, the text encoder 514"),
        ("sdxl", 1, "t5", "has 98 tokens, the text encoder 514"),
        ("sdxl", 2, "t5", "has 98 tokens, the text encoder 514"),
        ("sd3", 1, "llama", "has 261 tokens, the text encoder 514"),
        ("sd3", 3, "llama", "has 261 tokens, the text encoder 98"),
        ("sd3", 3, "clip", "has 514 tokens, the text encoder 98"),
        ("hunyuan_video", 1, "clip", "has 514 tokens, the text encoder 269"),
        ("hunyuan_video", 1, "t5", "is not LLaMA 3's: it has no token <|begin_of_text|>"),
        ("hunyuan_video", 2, "llama", "has 261 tokens, the text encoder 514"),
        ("framepack", 1, "t5", "is not LLaMA 3's: it has no token <|begin_of_text|>"),
    ],
)
def test_anothers_tokenizer_is_refused_when_planning(
    family_place: Make, name: str, number: int, wrong: str, said: str
) -> None:
    place = family_place(name)
    {"llama": write_llama_tokenizer, "t5": write_t5_tokenizer, "clip": write_clip_tokenizer}[wrong](
        place.folder / "other"
    )
    text = problem(place, {f"tokenizer_{number}": "other"})
    assert text.splitlines()[0] == f"error: the tokenizer in {place.folder / 'other'} {said}"
    assert f'tokenizer_{number} = "other"' in text
    titles = {1: "LLaMA 3" if name in ("hunyuan_video", "framepack") else "CLIP", 2: "CLIP", 3: "T5"}
    assert (
        text.splitlines()[-1]
        == f"hint: name the folder of {titles[number]}'s own tokenizer with model.tokenizer_{number}"
    )


def llama_2(folder: Path) -> Path:
    """LLaMA 2's: as many tokens as T5's, nearly; its </s> is token 2."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"piece {number}": number for number in range(3, 32_000)}}
    folder.mkdir()
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": []})
    )
    return folder


def test_a_llama_tokenizer_is_not_t5s(tmp_path: Path) -> None:
    """As many tokens as fit; the ids of the ends tell."""
    folder = llama_2(tmp_path / "llama")
    assert (
        misfit(folder, kind_of("T5"))
        == f"the tokenizer in {folder} is not T5's: </s> is its token 2, in the text encoder it is 1"
    )
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"</s>": 1, "<s>": 2}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert misfit(folder, kind_of("T5")) == f"the tokenizer in {folder} is not T5's: it has no token <pad>"
    content["model"]["vocab"] |= {"<pad>": 0, "▁photo": 15_373}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert (
        misfit(folder, kind_of("T5"))
        == f"the tokenizer in {folder} is not T5's: ▁photo is its token 15,373, in the text encoder it is 1,202"
    )


def test_the_stand_ins_and_the_built_in_one_fit(tmp_path: Path) -> None:
    write_t5_tokenizer(tmp_path / "t5", 32_100)
    assert misfit(tmp_path / "t5", kind_of("T5")) is None
    write_llama_tokenizer(tmp_path / "llama", 128_256)
    assert misfit(tmp_path / "llama", kind_of("LLaMA 3")) is None
    from runner.families.parts.text import _builtin_clip

    tokenizer = _builtin_clip("<|endoftext|>")
    kind = kind_of("CLIP")
    assert tuple(tokenizer("a photo of a cat").input_ids) == kind.encoding
    assert {token: tokenizer.get_vocab()[token] for token in (*kind.words, *kind.special)} == {
        **kind.words,
        **kind.special,
    }
    tokenizer.save_pretrained(tmp_path / "clip")
    assert misfit(tmp_path / "clip", kind_of("CLIP")) is None


def test_a_vocabulary_and_merges_without_tokenizer_json(tmp_path: Path) -> None:
    from runner.families.parts.text import _builtin_clip

    vocabulary = _builtin_clip("<|endoftext|>").get_vocab()
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    assert misfit(tmp_path, kind_of("CLIP")) is None
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<my-cat>": 49_408}))
    assert misfit(tmp_path, kind_of("CLIP", vocab_size=49_409)) is None, "a word of textual inversion"
    assert (
        misfit(tmp_path, kind_of("CLIP")) == f"the tokenizer in {tmp_path} has 49,409 tokens, the text encoder 49,408"
    )
    (tmp_path / "added_tokens.json").unlink()
    swapped = {**vocabulary, "<|startoftext|>": 49_407, "<|endoftext|>": 49_406}
    (tmp_path / "vocab.json").write_text(json.dumps(swapped))
    assert (
        misfit(tmp_path, kind_of("CLIP"))
        == f"the tokenizer in {tmp_path} is not CLIP's: <|startoftext|> is its token 49,407, in the text encoder it is 49,406"
    )


def pieces(folder: Path, **ends: Any) -> Path:
    """A folder with a small model of SentencePiece."""
    import sentencepiece

    folder.mkdir()
    (folder / "text.txt").write_text("\n".join(f"a photo of a cat number {n} {chr(97 + n % 26)}" for n in range(400)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        minloglevel=2,
        hard_vocab_limit=False,
        **ends,
    )
    return folder


T5_ENDS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}


def test_sentencepiece_models(tmp_path: Path) -> None:
    config = {"vocab_size": 200, "eos_token_id": 1, "pad_token_id": 0, "d_model": 8}
    good = pieces(tmp_path / "t5", **T5_ENDS)
    assert misfit(good, t5_tokenizer(config)) is None
    bad = pieces(tmp_path / "llama", pad_id=-1, unk_id=0, bos_id=1, eos_id=2)
    assert (
        misfit(bad, t5_tokenizer(config))
        == f"the tokenizer in {bad} is not T5's: </s> is its token 2, in the text encoder it is 1"
    )
    assert "has 160 tokens, the text encoder 100" in str(misfit(good, t5_tokenizer({**config, "vocab_size": 100})))


def test_sentencepiece_counts_as_training_does(family_place: Make, tmp_path: Path) -> None:
    """Folders of T5 may hold spiece.model alone: captions that are too long are counted with it too."""
    from transformers import AutoTokenizer

    folder = pieces(tmp_path / "t5", **T5_ENDS)
    (folder / "config.json").write_text('{"model_type": "t5"}')
    own = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = ["a photo of a cat", "cat,  number 7 ", "Ünï x", ""]
    wanted = [len(own(text, add_special_tokens=False).input_ids) for text in texts]
    assert count_tokens(folder / "spiece.model", texts) == wanted
    model = prepared(family_place("sd3").file).model
    moved = replace(model, tokenizers={**model.tokenizers, "text_encoder_3": folder})
    assert tokenizer_file(moved, "text_encoder_3") == folder / "spiece.model"
    (folder / "spiece.model").write_bytes(b"x")
    with pytest.raises(NoTokenizer):
        count_tokens(folder / "spiece.model", texts)


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        '{"model": 5}',
        '{"model": {"vocab": [1]}}',
        '{"model": {"vocab": {"a": 1e999}}}',
        '{"model": {"vocab": {"a": "b"}}}',
        "nonsense",
    ],
)
def test_damaged_tokenizers_are_named(family_place: Make, content: str) -> None:
    place = family_place("sd3")
    shutil.copytree(place.folder / "model" / "tokenizer_3", place.folder / "bad")
    (place.folder / "bad" / "tokenizer.json").write_text(content)
    text = problem(place, {"tokenizer_3": "bad"})
    assert 'tokenizer_3 = "bad"' in text
    assert "hint: name a whole one with model.tokenizer_3" in text
    (place.folder / "bad" / "tokenizer.json").unlink()
    (place.folder / "bad" / "spiece.model").write_bytes(b"\x00garbage")
    assert "the tokenizer in" in problem(place, {"tokenizer_3": "bad"})


def test_one_beside_a_text_encoder_is_named_there(family_place: Make) -> None:
    place = family_place("sd3")
    shutil.rmtree(place.folder / "model" / "tokenizer_3")
    write_llama_tokenizer(place.folder / "model" / "tokenizer_3")
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.file)
    text = caught.value.diagnostics[0].render()
    assert 'checkpoint = "model"' in text
    assert text.endswith("hint: name the folder of T5's own tokenizer with model.tokenizer_3")


def test_an_encoding_that_differs_is_refused_when_it_is_loaded(family_place: Make) -> None:
    """The same words by another rule: the vocabulary fits, what it makes of a text does not."""

    run = prepared(family_place("sd15").file)
    letters = read_json(run.folder / "model" / "tokenizer" / "tokenizer.json")["model"]["vocab"]
    words = {"p": letters["p"], "t</w>": letters["t</w>"]}
    encoder = run.model.components["text_encoder_1"]
    kind = replace(encoder.tokenizer, vocabulary=514, words=words, encoding=(1, 2))
    model = replace(run.model, components={**run.model.components, "text_encoder_1": replace(encoder, tokenizer=kind)})
    with pytest.raises(RunFailed, match=r'makes \[512, .*\] of "a photo of a cat", CLIP\'s makes \[1, 2\]') as caught:
        family("sd15").load_tokenizers(model)
    assert caught.value.diagnostics[0].hint == "name the folder of the right one with model.tokenizer_1"
