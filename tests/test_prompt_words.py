"""What a prompt file means and does not say: options that would become text, and errors that name the file's own line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.config.prompt_options import DIALECTS
from runner.config.prompts import parse_line
from runner.errors import InvalidConfig
from tests.inprocess import Verbs, prepared, verb
from tests.support import Place

__all__ = ["verb"]


def refusal(line: str, dialect: str = "kohya") -> str:
    with pytest.raises(InvalidConfig) as caught:
        parse_line(line, dialect, "p.txt", 3)
    return "\n".join(item.render() for item in caught.value.diagnostics)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_option_with_one_dash(dialect: str) -> None:
    assert refusal("a cat -w 640", dialect) == (
        "error: `-w` would be a part of the text: an option is two dashes, its letter and a blank\n"
        " ┌ p.txt:3:7\n"
        "3│ a cat -w 640\n"
        " │       ^^\n"
        "hint: write --w 640"
    )


@pytest.mark.parametrize(
    ("line", "marked", "hint"),
    [
        ("a cat --w=640", "--w=640", "--w 640"),
        ("a cat --w640", "--w640", "--w 640"),
        ("a cat -w640", "-w640", "--w 640"),
        ("a cat \u2013h 480", "\u2013h", "--h 480"),
        ("a cat \u2014d -1", "\u2014d", "--d -1"),
        ("a cat -l 7.5", "-l", "--l 7.5"),
        ("a cat --w 640 -h 480", "-h", "--h 480"),
        ("a cat -n ugly, blurry", "-n", "--n ugly,"),
        ("-f 25", "-f", "--f 25"),
        ("a cat -ss euler_a", "-ss", "--ss euler_a"),
        ("walk -i start.png", "-i", "--i start.png"),
        ("walk -ci a.JPG", "-ci", "--ci a.JPG"),
        ("walk -of target_index=1,no_post", "-of", "--of target_index=1,no_post"),
        ("a cat --n bad -s 20", "-s", "--s 20"),
    ],
)
def test_options_that_would_become_text(line: str, marked: str, hint: str) -> None:
    text = refusal(line)
    assert text.startswith(
        f"error: `{marked}` would be a part of the text: an option is two dashes, its letter and a blank\n"
    )
    assert f" │ {' ' * line.index(marked)}{'^' * len(marked)}\n" in text
    assert text.endswith(f"hint: write {hint}")


@pytest.mark.parametrize(
    "line",
    [
        "a well -known thing",
        "a well-known --old-- thing",
        "at -5 degrees, -w",
        "a -w thing",
        "the -s ending",
        "8 -bit art",
        "x -i think so",
        "-1 and -2",
        "mother -in -law",
        "a mid-1920s car",
        "F -22 jet",
        "a -ss nothing",
        "rock-n-roll",
        "letter w - 640",
        "e -mail, -10 C",
    ],
)
def test_dashes_that_are_text(line: str) -> None:
    for dialect in DIALECTS:
        assert parse_line(line, dialect).prompt == line


def test_options_without_a_prompt() -> None:
    assert refusal("  --w 640 --h 480") == (
        "error: there is no prompt before the options\n"
        " ┌ p.txt:3:3\n"
        "3│   --w 640 --h 480\n"
        " │   ^^^\n"
        "hint: options stand on the line of their prompt, behind its text"
    )


def problems(place: Place, *settings: str) -> str:
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.file, *settings)
    return "\n".join(item.render() for item in caught.value.diagnostics)


def test_what_a_family_cannot_use_is_shown_in_the_prompt_file(place: Place) -> None:
    place.write({"sampling": {"prompt_file": "p.txt", "dialect": "musubi"}})
    (place.folder / "p.txt").write_text("# mine\na cat --w 64 --h 64\na dog --w 64 --h 64 --f 25\n")
    assert problems(place) == (
        "error: prompt 2: family sd15 cannot use `frames`: this family makes stills\n"
        " ┌ p.txt:3:21\n"
        "3│ a dog --w 64 --h 64 --f 25\n"
        " │                     ^^^\n"
        "hint: take it out"
    )


def test_what_is_found_later_is_shown_in_the_prompt_file(family_place: Callable[..., Place]) -> None:
    place = family_place("sd3", sampling={"prompt_file": "p.txt"})
    (place.folder / "p.txt").write_text("a cat --w 64 --h 64 --ss ddim\n")
    found = problems(place)
    assert found.startswith(
        'error: prompt 1: the sampler "ddim" cannot follow the flow of Stable Diffusion 3 Medium\n'
        " ┌ p.txt:1:21\n"
        "1│ a cat --w 64 --h 64 --ss ddim\n"
        " │                     ^^^^\n"
    ), found
    (place.folder / "p.txt").unlink()
    (place.folder / "p.toml").write_text(
        '[prompt]\nsampler = "ddim"\n[[prompt.subset]]\nprompt = "a"\nwidth = 64\nheight = 64\n'
    )
    assert ' ┌ p.toml:2:11\n2│ sampler = "ddim"\n' in problems(place, "sampling.prompt_file=p.toml")


def test_a_missing_picture_is_shown_in_the_prompt_file(family_place: Callable[..., Place]) -> None:
    place = family_place("framepack", sampling={"prompt_file": "p.txt"})
    (place.folder / "p.txt").write_text("walk\nrun --ci pics/gone.png\n")
    assert problems(place) == (
        "error: prompt 1: one-frame inference needs control images\n"
        " ┌ p.txt:1:1\n"
        "1│ walk\n"
        " │ ^^^^\n"
        'hint: set control_images = ["…"], or image\n'
        f"error: prompt 2: there is no picture {place.folder / 'pics' / 'gone.png'}\n"
        " ┌ p.txt:2:5\n"
        "2│ run --ci pics/gone.png\n"
        " │     ^^^^"
    )


def test_values_in_toml_and_json_prompts(place: Place) -> None:
    (place.folder / "p.toml").write_text('[[prompts]]\nprompt = "a"\n\n[[prompts]]\nprompt = "b"\nwidth = "wide"\n')
    assert problems(place, "sampling.prompt_file=p.toml") == (
        'error: prompt 2: `width`: must be an integer, not the text "wide"\n'
        " ┌ p.toml:6:9\n"
        '6│ width = "wide"\n'
        " │         ^^^^^^"
    )
    (place.folder / "p.json").write_text(json.dumps([{"prompt": "b"}, {"prompt": "a", "frames": 3}], indent=2))
    assert problems(place, "sampling.prompt_file=p.json") == (
        "error: prompt 2: family sd15 cannot use `frames`: this family makes stills\n"
        " ┌ p.json:5:3\n5│   {\n │   ^\nhint: take it out"
    )


def test_sample_shows_them_too(place: Place, verb: Verbs, tmp_path: Path) -> None:
    (place.folder / "p.txt").write_text("a cat\na dog --f 25\n")
    assert verb(place, "sample", "--checkpoint", "base", "--prompt-file", "p.txt", "--dialect", "musubi").err == (
        "error: prompt 2: family sd15 cannot use `frames`: this family makes stills\n"
        " ┌ p.txt:2:7\n"
        "2│ a dog --f 25\n"
        " │       ^^^\n"
        "hint: take it out\n\n"
    )
    said = verb(place, "sample", "--checkpoint", "base", "--prompt", "a cat -w 640")
    assert (said.code, said.err.splitlines()[-1]) == (3, "")
    assert said.err.startswith("error: `-w` would be a part of the text: ")
