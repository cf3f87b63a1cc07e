"""run.toml, prompt files, --set, plan.json and run.lock of any shape: read, or refused in words and soon."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from hypothesis import given
from hypothesis import strategies as st

from runner.config.load import load
from runner.config.locate import locate
from runner.config.prompts import parse_line, read_prompt_file
from runner.config.sections import SectionProblem, parse_sections
from runner.config.toml import parse_toml
from runner.errors import Diagnostic, Invalid, InvalidConfig, Place, UserError, cut, visible
from runner.patterns import BadPattern, Search, SlowPattern, pattern_problem
from runner.plan.planfile import read_plan_file
from runner.store.lockfile import read_lock, write_lock
from tests.fuzzing import bounded, fuzz, read_or_refused
from tests.support import TINY
from tests.support import Place as Run
from tests.test_config import MINIMAL, prepared_errors
from tests.test_files import special


def refusal(file: Path, *settings: str) -> str:
    """All errors of a file, its folder written as `~`."""
    with bounded(8), pytest.raises(UserError) as caught:
        load(file, settings).require()
    found = "\n\n".join(finding.render() for finding in caught.value.diagnostics)
    assert len(found) < 60_000
    return found.replace(str(file.parent), "~")


def first(text: str) -> str:
    return text.partition("\n")[0]


DEEP = "run.toml cannot be read: it is nested too deeply"
TEXTS = {
    "a header without an end of line": (MINIMAL + "[a.b]", "unknown key `a`"),
    "a table that is a number": (
        MINIMAL + "[network]\nrank_pattern = 5",
        "`network.rank_pattern` must be a table of names",
    ),
    "no home folder": (
        MINIMAL.replace('"pics"', '"~nobody-here/x"'),
        "`dataset.sources.path`: there is no home folder ~nobody-here on this machine",
    ),
    "a NUL": (
        MINIMAL.replace('"pics"', '"a\\u0000"'),
        "`dataset.sources.path`: no file has a NUL character or half a character in its name",
    ),
    "a long path": (
        MINIMAL.replace('"pics"', f'"{"x" * 256}"'),
        "`dataset.sources.path`: a path has at most 4,000 bytes, and 255 in each of its parts",
    ),
    "5,000 digits": (
        MINIMAL + "x = " + "9" * 5000,
        "run.toml cannot be read: a number of it has more than 4,300 digits",
    ),
    "5,000 hexadecimal digits": (
        MINIMAL + "gradient_accumulation_steps = 0x" + "f" * 5000,
        "`training.gradient_accumulation_steps` is too large: an integer of TOML has 64 bits",
    ),
    "an infinite number": (
        MINIMAL + "learning_rate = 1e999",
        "`training.learning_rate` is inf; numbers must be finite",
    ),
    "a date in a list": (
        MINIMAL + "[network]\ntargets = [1979-05-27]",
        "`network.targets[0]` is a date; no key takes one",
    ),
    "990 parts": (MINIMAL + ".".join("a" * 990) + " = 1", "a key has more than 50 parts"),
    "990 quoted parts": (MINIMAL + " . ".join(['"a"', "'b'"] * 495) + " = 1", "a key has more than 50 parts"),
    "990 parts of a header": (MINIMAL + "[" + ".".join("a" * 990) + "]", "a key has more than 50 parts"),
    "30 parts": (MINIMAL + ".".join("a" * 30) + " = 1", DEEP),
    "5,000 lists": (MINIMAL + "x = " + "[" * 5000 + "]" * 5000, DEEP),
    "200 lists": (MINIMAL + "x = " + "[" * 200 + "]" * 200, DEEP),
    "200 tables": (MINIMAL + "x = " + "{a=" * 200 + "1" + "}" * 200, DEEP),
    "a list for a table": (MINIMAL.replace("[training]", "training = [1]\n[other]"), "unknown key `other`"),
    "a table for a list": (
        MINIMAL.replace("[[dataset.sources]]", "[dataset.sources]"),
        "`dataset.sources` must be an array of tables, not the table",
    ),
    "numbers for tables": (
        MINIMAL + "[sampling]\nprompts = [1]",
        "`sampling.prompts` must be an array of tables, not 1",
    ),
    "half a megabyte": (MINIMAL + 'x = "' + "y" * 2**19 + '"', "~/run.toml cannot be read: it has 524,4"),
    "numbers for everything": ("\n".join(f"{name} = 1" for name in ("schema_version", *list(TINY)[1:])), "`"),
    "lists for everything": ("\n".join(f"{name} = [[]]" for name in TINY), "`"),
    "40,000 unknown keys": (MINIMAL + "\n".join(f"k{n} = 1" for n in range(40_000)), "unknown key `k0` in [training]"),
    "20,000 wrong tables": (
        MINIMAL + "[[sampling.prompts]]\nx=1\n" * 15_000,
        "`sampling.prompts` has 15,000 entries; 10,000 are the most",
    ),
    "200,000 numbers": (MINIMAL + "x = [" + "1," * 200_000 + "]", "unknown key `x` in [training]"),
    "100,000 texts": (MINIMAL + "[network]\ntargets = [" + '"",' * 100_000 + "]", "`network.targets` "),
    "100,000 wrong texts": (MINIMAL + "[network]\ntargets = [" + "1," * 100_000 + "]", "`network.targets` "),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_harm(tmp_path: Path, name: str) -> None:
    text, words = TEXTS[name]
    file = tmp_path / "run.toml"
    file.write_text(text, encoding="utf-8")
    assert f"error: {words}" in refusal(file)


def test_a_list_with_bad_items_behind_the_ninth(tmp_path: Path) -> None:
    """All of them are named, each once."""
    file = tmp_path / "run.toml"
    file.write_text(MINIMAL + '[network]\nbase_weights = ["a"' + ', "b", 1' * 8 + "]\n", encoding="utf-8")
    found = refusal(file)
    assert [first(part) for part in found.split("\n\n")] == [
        "error: `network.base_weights` must be a list of texts, not 1"
    ] * 8


def test_more_errors_than_anybody_reads_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(MINIMAL + "\n".join(f"k{n} = 1" for n in range(60)), encoding="utf-8")
    found = refusal(file).split("\n\n")
    assert (len(found), found[-1]) == (51, "error: and 10 more errors\nhint: mend these first")


@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_only_a_regular_file_is_a_run(tmp_path: Path, kind: str) -> None:
    path = special(tmp_path, kind)
    with bounded(5), pytest.raises(InvalidConfig, match=re.escape(f"{path} cannot be read: ")):
        load(path)


def test_a_run_in_a_folder_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe4"))
    folder.mkdir()
    (folder / "run.toml").write_text(MINIMAL, encoding="utf-8")
    with pytest.raises(InvalidConfig) as caught:
        load(folder / "run.toml")
    assert caught.value.diagnostics[0].render() == (
        f"error: the name {tmp_path}/\\xe4/run.toml is not UTF-8\nhint: rename the file or folder"
    )


# --- what messages show -----------------------------------------------------------------------------------------------


def test_control_characters_are_shown_not_sent() -> None:
    assert visible("a\x1b[2Jb\x07\u202ec\ud800\udce4\u0085\td\n") == "a\\x1b[2Jb\\x07\\u202ec\\ud800\\xe4\\x85\td\n"
    place = Place(file="f\x1b", line=3, column=5, length=4, text='a = "\x1bx\x07"')
    assert Diagnostic("m\x1b", (place,), "h\x07").render() == (
        'error: m\\x1b\n ┌ f\\x1b:3:5\n3│ a = "\\x1bx\\x07"\n │     ^^^^^^^^^^\nhint: h\\x07'
    )


def test_long_lines_are_cut() -> None:
    assert cut("a" * 1005 + "\nb") == "a" * 1000 + "… (5 more characters)\nb"
    text = "x" * 300 + "HERE" + "y" * 300
    lines = Diagnostic("m", (Place(file="f", line=1, column=301, length=4, text=text),)).render().split("\n")
    assert lines[2] == "1│ …" + "x" * 40 + "HERE" + "y" * 116 + "…"
    assert lines[3] == " │ " + " " * 41 + "^^^^"
    whole = Diagnostic("m", (Place(file="f", line=1, column=301, length=304, text=text),)).render().split("\n")
    assert whole[3] == " │ " + " " * 41 + "^" * 121
    end = Diagnostic("m", (Place(file="f", line=1, column=600, length=5, text=text),)).render().split("\n")
    assert end[2] == "1│ …" + "y" * 160
    assert end[3].rstrip("^") == " │ " + " " * 156


def test_json_output_is_json_and_printable(capsys: pytest.CaptureFixture[str]) -> None:
    from runner.cli import out

    content = {"a": "\ud800 \udce4\x1b\u202e\x85 ä"}
    out.record(content)
    text = capsys.readouterr().out
    assert json.loads(text) == content
    assert text == '{\n  "a": "\\ud800 \\udce4\\u001b\\u202e\\u0085 ä"\n}\n'


def test_what_is_said_keeps_its_own_colours_only() -> None:
    from runner.cli import out

    assert out.shown(out.paint("a\x1b[2J", "red") + "\x1b[8m\udce4") == "\x1b[31ma\\x1b[2J\x1b[0m\\x1b[8m\\xe4"


# --- regular expressions ----------------------------------------------------------------------------------------------

NAME = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def test_an_expression_that_takes_for_ever_is_refused(place: Run) -> None:
    slow = r"((.?){1,99}){1,99}\.$"  # a dot that is there, but never at the end
    with bounded(10), pytest.raises(SlowPattern):
        Search([slow]).any(NAME)
    for network in ({"targets": [slow]}, {"rank_pattern": {slow: 4}}, {"alpha_pattern": {slow: 4.0}}):
        with bounded(10):
            found = prepared_errors(place, place.write({"network": network}).read_text(encoding="utf-8"))
        assert f"error: the regular expression {slow!r} takes too long\n" in found


@pytest.mark.parametrize("pattern", ["(a+)+$", "(x+x+)+y", "(.*)*x$", r"(\w+\.?)+!", ".*.*.*.*.*.*.*.*zz"])
def test_expressions_that_python_cannot_finish(pattern: str) -> None:
    with bounded(5):
        found = Search([pattern])
        assert [found.any(name) for name in ("a" * 40 + "b", NAME)] == [False, False]


def test_expressions_mean_what_python_says() -> None:
    found = Search([r"attn1\.to_[qk]$", "^(?!.*norm).*proj", r"(\d)\.attn(?=2)"])
    assert [found.any(name) for name in (NAME, NAME + "_norm", "mid.proj_in", "mid.norm.proj")] == [
        True,
        False,
        True,
        False,
    ]
    assert found.matches(r"(\d)\.attn(?=2)", "x.0.attn2.to_q")
    assert pattern_problem("(") == "missing ), unterminated subpattern at position 0"
    assert pattern_problem("a{1,99999999999}") == "the repetition number is too large"
    assert pattern_problem("(" * 5000) is not None
    with pytest.raises(BadPattern):
        Search(["("])


def test_a_wrong_expression_is_said_once(place: Run) -> None:
    text = place.write({"network": {"targets": ["("], "rank_pattern": {"[": 4}}}).read_text(encoding="utf-8")
    found = prepared_errors(place, text)
    assert [first(part) for part in found.split("\n\n")] == [
        "error: '(' is not a regular expression: missing ), unterminated subpattern at position 0",
        "error: '[' is not a regular expression: unterminated character set at position 0",
    ]


# --- --set ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.max_train_steps=" + "9" * 5000, "a number of it has more than 4,300 digits"),
        (".".join("a" * 990) + "=1", "a key has at most 16 parts"),
        ("training.learning_rate=" + "[" * 5000, "it is nested too deeply"),
        ("training={" + ".".join("a" * 5000) + "=1}", "a key has more than 50 parts"),
        ("training.²=1", "unknown key `²` in [training]"),
        ("dataset.sources.99999999999=1", "there is no `99999999999` in run.toml to set"),
        ("run.name=\udce4", "it is not UTF-8"),
        ("training.learning_rate=1979-05-27", "`training.learning_rate` is a date"),
        ("...=1", "unknown key ``"),
    ],
)
def test_settings_that_harm(tmp_path: Path, setting: str, message: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(MINIMAL, encoding="utf-8")
    assert message in refusal(file, setting)


# --- prompts ----------------------------------------------------------------------------------------------------------

PROMPTS = {
    "a.json": {
        '[1, "x", {"prompt": "a"}]': "prompt 1 must be a table with the key `prompt`",
        '{"prompts": 5}': "a.json must be a list of objects",
        "[" * 100_000: "a.json cannot be read: it is nested too deeply",
        '[{"prompt": "a", "width": '
        + "9" * 5000
        + "}]": "a.json cannot be read: a number of it has more than 4,300 digits",
        '[{"prompt": "\\ud800"}]': "prompt 1 cannot be read: it holds half a character (a lone surrogate)",
        '[{"prompt": "' + "x" * 20_001 + '"}]': "prompt 1: `prompt` has 20,001 characters; 20,000 are the most",
        "[\n": "not valid JSON: Expecting value",
        "": "not valid JSON: Expecting value",
    },
    "a.toml": {
        "prompts = [1]": "prompt 1 must be a table with the key `prompt`",
        "prompts = 5": "a.toml has no [[prompts]]",
        "[prompt]\nsubset = 5": "`prompt.subset` must be an array of tables",
        "[prompt]\nsubset = [1]": "`prompt.subset` must be an array of tables",
        "[[prompts]]\nprompt = 0x" + "f" * 5000: "prompt 1 cannot be read: a number of it has more than 4,300 digits",
        "[a.b]": "a.toml has no [[prompts]]",
    },
    "a.txt": {
        "x --w " + "9" * 5000: "option `--w` (width): must be an integer, not '999",
        "x --l 1e999": "option `--l` (cfg_scale): ",
        "x --l nan": "option `--l` (cfg_scale): ",
        "x --s y\n" * 200: "option `--s` (num_inference_steps): must be an integer, not 'y'",
    },
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in PROMPTS.items() for text in texts])
def test_prompts_that_harm(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with bounded(5), pytest.raises(InvalidConfig) as caught:
        read_prompt_file(tmp_path / name, "kohya")
    assert str(caught.value).startswith(PROMPTS[name][text])
    assert len(caught.value.diagnostics) <= 51


@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder"])
def test_a_prompt_file_is_a_regular_one(place: Run, kind: str) -> None:
    path = special(place.folder, kind).rename(place.folder / "p.txt")
    text = place.write({"sampling": {"prompt_file": "p.txt"}}).read_text(encoding="utf-8")
    with bounded(10):
        assert f"error: {Path('~') / path.name} is a" in prepared_errors(place, text)


def test_sections_without_end() -> None:
    for spec in ("0-99999999999", "1001", "-1001", "9" * 5000):
        with bounded(2), pytest.raises(SectionProblem, match="names a section that no video has: 1,000 are the most"):
            parse_sections(f"{spec}:a;;;1:b")
    assert len(parse_sections("0-1000:a").values) == 1001


# --- plan.json, run.lock ----------------------------------------------------------------------------------------------

PLAN = {"version": 1, "file": "run.toml", "settings": [], "target": None, "actions": []}
PLANS: dict[str, str] = {
    "": "Expecting value: line 1 column 1 (char 0)",
    "[]": "it holds no table",
    "5": "it holds no table",
    "{}": "`version` is missing or of another kind",
    "[" * 100_000: "it is nested too deeply",
    '{"version": ' + "1" * 5000 + "}": "a number of it has more than 4,300 digits",
    json.dumps({**PLAN, "version": True}): "`version` is missing or of another kind",
    json.dumps({**PLAN, "file": "a\0"}): "`file` is missing or of another kind",
    json.dumps({**PLAN, "file": "\ud800"}): "`file` is missing or of another kind",
    json.dumps({**PLAN, "file": "x" * 300}): "`file` is missing or of another kind",
    json.dumps({**PLAN, "settings": "a=1"}): "`settings` is missing or of another kind",
    json.dumps({**PLAN, "settings": [1]}): "`settings` is missing or of another kind",
    json.dumps({**PLAN, "target": []}): "`target` is missing or of another kind",
    json.dumps({**PLAN, "target": "x"}): "`target` is missing or of another kind",
    json.dumps({**PLAN, "actions": {}}): "`actions` is missing or of another kind",
    json.dumps(
        {**PLAN, "actions": [{"stage": "train", "fingerprint": 5, "symbol": "+"}]}
    ): "`actions` is missing or of another kind",
}


@pytest.mark.parametrize("text", PLANS)
def test_plans_of_any_shape(tmp_path: Path, text: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text, encoding="utf-8")
    with bounded(5), pytest.raises(Invalid) as caught:
        read_plan_file(file)
    assert str(caught.value) == f"{file} is no plan ({PLANS[text]})"


LOCKS: dict[bytes, str] = {
    b"": "it has no version",
    b"version = '1'": "it has no version",
    b"version = true": "it has no version",
    b"version = " + b"1" * 5000: "a number of it has more than 4,300 digits",
    b"version = 1\nenvironment = 5": "`environment` is no table of plain values",
    b"version = 1\n[environment]\ndevice = [1]": "`environment` is no table of plain values",
    b"version = 1\nx = " + b"[" * 9000: "it is nested too deeply",
    b"\xff": "it is not UTF-8 (byte 0)",
    b"version = 1\n[inputs]\nx = 0x" + b"f" * 5000: "`inputs` is no table of plain values",
}


@pytest.mark.parametrize("content", LOCKS)
def test_locks_of_any_shape(tmp_path: Path, content: bytes) -> None:
    run = tmp_path / "run.toml"
    run.with_suffix(".lock").write_bytes(content)
    with bounded(5), pytest.raises(Invalid) as caught:
        read_lock(run)
    assert str(caught.value) == f"{run.with_suffix('.lock')} cannot be read: {LOCKS[content]}"
    write_lock(run, {"environment": {"device": "cpu"}})  # whatever lies there is replaced
    assert read_lock(run) == {"environment": {"device": "cpu"}}


# --- anything ---------------------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.integers(-(2**70), 2**70), st.booleans(), st.floats(), st.text(max_size=12), st.dates(), st.just("x" * 300)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def changed(draw: st.DrawFn) -> dict[str, Any]:
    """The tiny run with some values of any kind at some of its places."""
    document: dict[str, Any] = json.loads(json.dumps(TINY))
    for _ in range(draw(st.integers(1, 3))):
        node: Any = document
        while True:
            inner = list(node) if isinstance(node, dict) else list(range(len(node)))
            at = draw(st.sampled_from(inner)) if inner else None
            deeper = at is not None and isinstance(node[at], (dict, list)) and node[at] and draw(st.booleans())
            if not deeper:
                break
            node = node[at]
        if isinstance(node, dict):
            node[draw(st.sampled_from(["x", "prompts", "publish", "targets", "rank_pattern", at or "x"]))] = draw(
                VALUES
            )
        elif at is not None:
            node[at] = draw(VALUES)
    return document


@fuzz(120)
@given(changed())
def test_any_run(tmp_path: Path, document: dict[str, Any]) -> None:
    file = tmp_path / "run.toml"
    try:
        file.write_text(tomlkit.dumps(document), encoding="utf-8")
    except (ValueError, TypeError, AttributeError):
        return  # tomlkit's own limits
    found = read_or_refused(lambda: load(file))
    for finding in found.diagnostics if found is not None else ():
        assert finding.render()


PIECES = st.sampled_from(
    [
        "[",
        "]",
        "[[",
        "]]",
        "a",
        "b.c",
        '"q"',
        " = ",
        "1",
        '"x"',
        "'''",
        '"""',
        "\n",
        "#",
        "{",
        "}",
        ",",
        ".",
        "\\",
        "\r\n",
        "é",
        "1979-05-27",
        "inf",
        "0x1f",
        "\t",
        "\0",
        "training",
        "schema_version = 1\n",
        " ",
    ]
)


@fuzz(200)
@given(st.lists(PIECES, max_size=30).map("".join) | st.text(max_size=40))
def test_any_text(text: str) -> None:
    document = read_or_refused(lambda: parse_toml(text, "f"))
    if document is not None:
        positions = locate(text)
        assert set(document) <= {path[0] for path in (*positions.keys, *positions.headers)}


@fuzz(100)
@given(
    st.lists(PIECES | st.text(max_size=5), max_size=12).map("".join),
    st.sampled_from(["", "training.learning_rate=", "dataset."]),
)
def test_any_setting(tmp_path: Path, typed: str, before: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(MINIMAL, encoding="utf-8")
    read_or_refused(lambda: load(file, [before + typed]))


@fuzz(100)
@given(VALUES, st.sampled_from([".json", ".toml"]))
def test_any_prompt_file(tmp_path: Path, value: Any, suffix: str) -> None:
    file = tmp_path / f"p{suffix}"
    try:
        document = {"prompts": value} if suffix == ".toml" else value
        text = tomlkit.dumps(document) if suffix == ".toml" else json.dumps(document, default=str)
    except (ValueError, TypeError, AttributeError):
        return
    file.write_text(text, encoding="utf-8", errors="replace")
    read_or_refused(lambda: read_prompt_file(file, "kohya"))


@fuzz(150)
@given(
    st.lists(
        st.sampled_from(["--w", "--of", "--ci", " ", "9", "-", ";;;", ":", "0-3", "a", "=", ",", "--vs", "--n"])
        | st.text(max_size=4),
        max_size=15,
    ).map("".join)
)
def test_any_prompt_line(line: str) -> None:
    read_or_refused(lambda: parse_line(line, "framepack"))
    read_or_refused(lambda: parse_sections(line), SectionProblem)


@fuzz(100)
@given(VALUES, st.sampled_from(sorted(PLAN)))
def test_any_plan(tmp_path: Path, value: Any, key: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({**PLAN, key: value}, default=str), encoding="utf-8")
    read_or_refused(lambda: read_plan_file(file))


@fuzz(100)
@given(st.lists(PIECES, max_size=20).map("".join), st.booleans())
def test_any_lock(tmp_path: Path, text: str, versioned: bool) -> None:
    run = tmp_path / "run.toml"
    run.with_suffix(".lock").write_bytes((("version = 1\n" if versioned else "") + text).encode())
    found = read_or_refused(lambda: read_lock(run))
    if found is not None:
        from runner.store.lockfile import differences

        differences(found, {"environment": {"device": "cpu"}})
