"""Options that would become a part of a prompt's text: long names, other dashes, colons, and in tables."""

from __future__ import annotations

import pytest

from runner.config.prompts import parse_line
from runner.errors import InvalidConfig
from tests.inprocess import prepared
from tests.support import Place


@pytest.mark.parametrize(
    ("line", "marked", "hint"),
    [
        ("a cat -W 640", "-W", "--w 640"),
        ("a cat --W=640", "--W=640", "--w 640"),
        ("a cat -width 640", "-width", "--w 640"),
        ("a cat -seed 1", "-seed", "--d 1"),
        ("a cat --negative_prompt bad", "--negative_prompt", "--n bad"),
        ("a cat --w:640", "--w:640", "--w 640"),
        ("a cat ---w 640", "---w", "--w 640"),
        ("a cat \u2014\u2014w 640", "\u2014\u2014w", "--w 640"),
        ("a cat,--w 640", "--w", "--w 640"),
        ("a cat -l .5", "-l", "--l .5"),
        ("a cat -s 20,", "-s", "--s 20"),
        ("walk -i a.jxl", "-i", "--i a.jxl"),
    ],
)
def test_more_options_that_would_become_text(line: str, marked: str, hint: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        parse_line(line, "kohya")
    found = caught.value.diagnostics[0]
    assert found.message.startswith(f"`{marked}` would be a part of the text")
    assert found.places[0].column == line.index(marked) + 1
    assert found.hint == f"write {hint}"


@pytest.mark.parametrize(
    "line", ["rock--n roll", "a house\u2014i think so", "scale -1:10 model", "a Canon -S90", "man-h 5"]
)
def test_more_dashes_that_are_text(line: str) -> None:
    assert parse_line(line, "kohya").prompt == line


@pytest.mark.parametrize(
    ("word", "hint"), [("width", "write --w"), ("W", "write --w"), ("steps", "write --s"), ("cfg", "write --l")]
)
def test_words_for_letters(word: str, hint: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        parse_line(f"a cat --{word} 7", "kohya")
    assert (caught.value.diagnostics[0].message, caught.value.diagnostics[0].hint) == (
        f"unknown option `--{word}`",
        hint,
    )


def test_options_in_a_table_are_text_and_said(place: Place) -> None:
    place.write({"sampling": {"prompts": [{"prompt": "a cat --w 64 --n ugly"}]}})
    assert [(warning.message, warning.hint) for warning in prepared(place.file).warnings] == [
        ("prompt 1: `--w` is a part of its text", "where an option is meant, write width = 64 beside the prompt"),
        (
            "prompt 1: `--n` is a part of its text",
            "where an option is meant, write negative_prompt = … beside the prompt",
        ),
    ]


def test_pure_noise_and_the_samplers_of_a_prompt_file(place: Place) -> None:
    (place.folder / "p.txt").write_text("a cat\na dog --ss lms\n")
    place.write(
        {
            "model": {"prediction_type": "v_prediction"},
            "training": {"loss": {"zero_terminal_snr": True}},
            "sampling": {"prompt_file": "p.txt"},
        }
    )
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.file)
    assert caught.value.diagnostics[0].render() == (
        'error: prompt 2: the sampler "lms" cannot start from pure noise, which zero_terminal_snr needs\n'
        " ┌ p.txt:2:7\n"
        "2│ a dog --ss lms\n"
        " │       ^^^^\n"
        "hint: use one of ddim, ddpm, euler, euler_a, unipc, dpm++_2m, dpm++_2m_karras, dpm++_sde, dpm++_sde_karras"
    )


def test_a_line_of_a_file_is_an_editors_line(place: Place) -> None:
    (place.folder / "p.txt").write_text("a cat\u2028that sleeps\n", encoding="utf-8")
    place.write({"sampling": {"prompt_file": "p.txt", "prompts": None}})
    assert [prompt.prompt for prompt in prepared(place.file).prompts] == ["a cat\u2028that sleeps"]
