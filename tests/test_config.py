"""run.toml: positions, types, cross-tool hints, every class of error in whole messages, --set, fmt, schema."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from runner.cli.schema import schema_text
from runner.config.foreign import FOREIGN_KEYS
from runner.config.format import full_text, minimal_text, tidy_text
from runner.config.load import load
from runner.config.locate import locate
from runner.config.schema import all_keys, leaf_keys
from runner.errors import InvalidConfig, UsageError, sort_diagnostics
from schemas import RunConfig
from schemas.walk import docstrings
from tests.inprocess import prepared
from tests.support import DATA, ROOT, Place

MINIMAL = """schema_version = 1
[run]
name = "t"
[model]
family = "sd15"
checkpoint = "model"
[dataset]
[[dataset.sources]]
path = "pics"
[training]
max_train_steps = 4
"""


def rendered(file: Path, *settings: str) -> str:
    """All findings of a file as printed."""
    return "\n\n".join(finding.render() for finding in sort_diagnostics(load(file, settings).diagnostics))


def prepared_errors(place: Place, text: str) -> str:
    """All findings of the file and everything around it; the place's folder is written as `~`."""
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.text(text))
    found = "\n\n".join(finding.render() for finding in caught.value.diagnostics)
    return found.replace(str(place.folder), "~")


# --- positions --------------------------------------------------------------------------------------------------------


def paths_of(node: Any, path: tuple[Any, ...] = ()) -> set[tuple[Any, ...]]:
    found: set[tuple[Any, ...]] = set()
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in items:
        found |= {(*path, name)} | paths_of(value, (*path, name))
    return found


TRICKY = '''# comment
a.b = 1
"q\\"x" = """multi
""line"""""
'lit.x' = [1, [2, 3], { z = 1, y = { k = "#" } }, # c
  5 ]
when = 1979-05-27 07:32:00 # a date with a blank
[x.y]
f = 1.5
[[s]]
p = 1
[s.t]
u = 1
[[s]]
p = 2
[[s.w]]
v = 1
[[s.w]]
v = 2
'''


def toml_files() -> list[Path]:
    return [*ROOT.glob("recipes/*/*.toml"), *DATA.glob("*.toml"), ROOT / "pyproject.toml"]


@pytest.mark.parametrize("text", [TRICKY, *(file.read_text() for file in toml_files())], ids=str.splitlines)
def test_positions_have_exactly_the_paths_of_tomli(text: str) -> None:
    positions = locate(text)
    ours = set(positions.keys) | set(positions.values) | set(positions.headers)
    assert ours == paths_of(tomli.loads(text))


KEYS = st.from_regex(r"[A-Za-z0-9_-]{1,6}", fullmatch=True)
SCALARS = st.one_of(
    st.integers(-(10**9), 10**9), st.booleans(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=12)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)


@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_positions_of_any_document(document: dict[str, Any]) -> None:
    import tomlkit

    text = tomlkit.dumps(document)
    parsed = tomli.loads(text)
    positions = locate(text)
    assert set(positions.keys) | set(positions.values) | set(positions.headers) == paths_of(parsed)


def test_a_span_covers_the_value() -> None:
    text = 'a = "x" # c\n[t]\n  bb = [1, 22]\n'
    positions = locate(text)
    lines = text.split("\n")

    def shown(span: Any) -> str:
        return lines[span.line - 1][span.column - 1 : span.column - 1 + span.length]

    assert shown(positions.values["a",]) == '"x"'
    assert shown(positions.keys["t", "bb"]) == "bb"
    assert shown(positions.values["t", "bb", 1]) == "22"
    assert shown(positions.headers["t",]) == "[t]"


# --- errors, whole messages -------------------------------------------------------------------------------------------


def test_unknown_key_with_a_near_name(place: Place) -> None:
    file = place.text(MINIMAL + '[[sampling.prompts]]\nprompt = "a"\nnegativ_prompt = "b"\n')
    assert rendered(file) == (
        "error: unknown key `negativ_prompt` in [[sampling.prompts]]\n"
        "  ┌ run.toml:14:1\n"
        '14│ negativ_prompt = "b"\n'
        "  │ ^^^^^^^^^^^^^^\n"
        "hint: did you mean `negative_prompt`?"
    )


def test_key_of_another_section(place: Place) -> None:
    file = place.text(MINIMAL.replace("[dataset]\n", "[dataset]\nlearning_rate = 1e-4\n"))
    assert rendered(file) == (
        "error: unknown key `learning_rate` in [dataset]\n"
        " ┌ run.toml:8:1\n"
        "8│ learning_rate = 1e-4\n"
        " │ ^^^^^^^^^^^^^\n"
        "hint: this key stands in [training]"
    )


@pytest.mark.parametrize(
    ("section", "name", "hint"),
    [
        ("network", "network_dim", "here this is `rank`"),
        ("network", "network_alpha", "here this is `alpha`"),
        ("training", "sample_every_n_steps", "here this is `sampling.every_n_steps`"),
        ("training", "train_batch_size", "here this is `dataset.batch_size`"),
        ("training", "unet_lr", "here this is `training.components.denoiser`"),
        ("run", "output_name", "here this is `name`"),
        ("training", "xformers", 'here: model.attention = "sdpa"; PyTorch\'s own kernel is as fast'),
        ("sampling", "guidence", "here `guidance` is `cfg_scale`"),
    ],
)
def test_other_tools_names(place: Place, section: str, name: str, hint: str) -> None:
    text = MINIMAL if f"[{section}]" in MINIMAL else MINIMAL + f"[{section}]\n"
    file = place.text(text.replace(f"[{section}]\n", f"[{section}]\n{name} = 4\n"))
    assert rendered(file).endswith("hint: " + hint)


def test_the_table_of_other_tools_names_is_true() -> None:
    keys = all_keys()
    for name, ours in FOREIGN_KEYS.items():
        for dotted in re.findall(
            r"\b(?:run|model|network|dataset|caching|training|sampling|selection)(?:\.\w+)+", ours
        ):
            assert dotted in keys, f"{name} → {dotted}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            'learning_rate = "1e-4"',
            'error: `training.learning_rate` must be a number above 0 and of at most 1000, not the text "1e-4"\n'
            "  ┌ run.toml:12:17\n"
            '12│ learning_rate = "1e-4"\n'
            "  │                 ^^^^^^\n"
            "hint: write it without quotes: learning_rate = 1e-4",
        ),
        (
            "compile = 1",
            "error: `training.compile` must be true or false, not 1\n"
            "  ┌ run.toml:12:11\n"
            "12│ compile = 1\n"
            "  │           ^\n"
            "hint: `runner explain training.compile` says more",
        ),
        (
            "gradient_accumulation_steps = true",
            "error: `training.gradient_accumulation_steps` must be an integer from 1 to 100,000, not true\n"
            "  ┌ run.toml:12:31\n"
            "12│ gradient_accumulation_steps = true\n"
            "  │                               ^^^^\n"
            "hint: `runner explain training.gradient_accumulation_steps` says more",
        ),
        (
            "max_grad_norm = -1.0",
            "error: `training.max_grad_norm` must be a number from 0 to 1,000,000, not -1.0\n"
            "  ┌ run.toml:12:17\n"
            "12│ max_grad_norm = -1.0\n"
            "  │                 ^^^^\n"
            "hint: `runner explain training.max_grad_norm` says more",
        ),
        (
            'mixed_precision = "bf-16"',
            'error: `training.mixed_precision` must be one of "no", "fp16", "bf16", not the text "bf-16"\n'
            "  ┌ run.toml:12:19\n"
            '12│ mixed_precision = "bf-16"\n'
            "  │                   ^^^^^^^\n"
            'hint: did you mean "bf16"?',
        ),
        (
            "learning_rate = inf",
            "error: `training.learning_rate` is inf; numbers must be finite\n"
            "  ┌ run.toml:12:17\n"
            "12│ learning_rate = inf\n"
            "  │                 ^^^",
        ),
        (
            "learning_rate = 2024-01-01",
            "error: `training.learning_rate` is a date; no key takes one\n"
            "  ┌ run.toml:12:17\n"
            "12│ learning_rate = 2024-01-01\n"
            "  │                 ^^^^^^^^^^\n"
            "hint: put it in quotes",
        ),
    ],
)
def test_wrong_types_and_ranges(place: Place, line: str, message: str) -> None:
    assert rendered(place.text(MINIMAL + line + "\n")) == message


def test_missing_keys_and_sections(place: Place) -> None:
    assert rendered(place.text(MINIMAL.replace('name = "t"\n', ""))) == (
        "error: [run] needs `name`\n ┌ run.toml:2:1\n2│ [run]\n │ ^^^^^\nhint: add `name = …`; name is text"
    )
    assert rendered(place.text(MINIMAL.split("[training]")[0])) == (
        "error: section [training] is missing\n ┌ run.toml\nhint: add [training]; see `runner explain training`"
    )


def test_all_errors_at_once_sorted_by_line(place: Place) -> None:
    text = MINIMAL.replace('name = "t"', 'name = "a/b"\nsede = 1').replace(
        "= 4\n", "= 0\nlr = 1\nmax_train_epochs = 2\n"
    )
    found = sort_diagnostics(load(place.text(text)).diagnostics)
    assert [finding.places[0].line for finding in found] == [3, 4, 12, 12, 13]
    assert "it must" not in found[0].message


def test_conflicts_show_both_places(place: Place) -> None:
    text = MINIMAL + 'max_train_epochs = 2\n[caching]\ntext = "disk"\n[training.components]\ntext_encoder_1 = true\n'
    assert rendered(place.text(text)) == (
        "error: [training] has `max_train_steps` and `max_train_epochs`; they say the same thing\n"
        "  ┌ run.toml:11:1\n"
        "11│ max_train_steps = 4\n"
        "  │ ^^^^^^^^^^^^^^^\n"
        "  ┌ run.toml:12:1\n"
        "12│ max_train_epochs = 2\n"
        "  │ ^^^^^^^^^^^^^^^^\n"
        "hint: keep one of them\n"
        "\n"
        'error: captions cannot be cached (caching.text = "disk") while a text encoder trains\n'
        "  ┌ run.toml:14:1\n"
        '14│ text = "disk"\n'
        "  │ ^^^^\n"
        "  ┌ run.toml:16:1\n"
        "16│ text_encoder_1 = true\n"
        "  │ ^^^^^^^^^^^^^^\n"
        "hint: leave caching.text out, or turn off training.components.text_encoder_1"
    )


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        ("[model.x]\n", "unknown key `x`"),
        (
            '[training.scheduler]\ntype = "linear"\nargs = { power = 2 }\n',
            'the schedule "linear" has no argument `power`',
        ),
        ("[training.optimizer]\nargs = { betas2 = 2 }\n", 'the optimizer "adamw" has no argument `betas2`'),
        ("[training.optimizer]\nargs = { amsgrad = 2 }\n", "`amsgrad` of the optimizer must be true or false, not 2"),
        ("[training.scheduler]\nwarmup_steps = 9\n", "the warm-up of 9 steps is longer than the run of 4"),
        ("[training.timesteps]\nmin = 600\nmax = 500\n", "min 600 is not below max 500"),
        ("[network]\nconv_alpha = 2\n", "`conv_alpha` without `conv_rank`"),
        ('[network]\ntargets = ["("]\n', "is not a regular expression"),
        ('[selection]\nstrategy = "manual"\n', 'strategy = "manual" needs `step`'),
        ("[selection]\nstep = 3\n", '`step` is for strategy = "manual"'),
        ('[[selection.publish]]\ndirectory = "p"\nformat = "kohya"\n', "this is a full fine-tune"),
        (
            '[[selection.publish]]\ndirectory = "p"\nformat = "comfyui"\nwhich = "all"\nname = "x"\n',
            "the name needs {step}",
        ),
        ('[[selection.publish]]\ndirectory = "p"\nformat = "comfyui"\nname = "{x}"\n', "has a field that is not known"),
        ("[training.components]\ndenoiser = false\n", "nothing trains"),
        ("[dataset.buckets]\nmin_size = 64\nmax_size = 32\n", "`min_size` 64 is above `max_size` 32"),
        ("[dataset.held_out]\n", "[dataset.held_out] is empty"),
        ("[training.loss]\nmin_snr_gamma = 5\ndebiased_estimation = true\n", "two weightings of the same loss"),
        (
            '[sampling]\nsampler = "pndm"\n[training.loss]\nzero_terminal_snr = true\n',
            'the sampler "pndm" cannot start from pure noise',
        ),
    ],
)
def test_more_findings(place: Place, lines: str, part: str) -> None:
    assert part in rendered(place.text(MINIMAL + lines))


def test_syntax_error_has_line_and_column(place: Place) -> None:
    with pytest.raises(InvalidConfig) as caught:
        load(place.text("schema_version = 1\n[run]\nname = hearts\n"))
    assert caught.value.diagnostics[0].render() == (
        "error: not valid TOML: invalid value\n"
        " ┌ run.toml:3:8\n"
        "3│ name = hearts\n"
        " │        ^\n"
        'hint: text stands in quotes: "hearts"'
    )


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"\xff\xfe", "is not UTF-8"),
        (b"a = 1\na = 2\n", "overwrite"),
        (b"[" * 3000, "not valid TOML"),
        (b"", "section [run] is missing"),
    ],
)
def test_unreadable_files(place: Place, content: bytes, part: str) -> None:
    place.file.write_bytes(content)
    try:
        text = rendered(place.file)
    except InvalidConfig as error:
        text = error.diagnostics[0].render()
    assert part in text


def test_a_newer_schema_is_refused(place: Place) -> None:
    assert rendered(place.text(MINIMAL.replace("schema_version = 1", "schema_version = 2"))) == (
        "error: this file has schema_version 2; this runner reads 1\n"
        " ┌ run.toml:1:18\n1│ schema_version = 2\n │                  ^\nhint: update runner"
    )


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="there is no file"):
        load(tmp_path / "run.toml")


# --- files and data ---------------------------------------------------------------------------------------------------


def test_missing_checkpoint_source_and_prompt_file_together(place: Place) -> None:
    text = MINIMAL.replace('"model"', '"modle"').replace('"pics"', '"pcis"') + '[sampling]\nprompt_file = "p.txt"\n'
    assert prepared_errors(place, text) == (
        "error: there is no file or folder ~/modle\n"
        " ┌ run.toml:6:14\n"
        '6│ checkpoint = "modle"\n'
        " │              ^^^^^^^\n"
        "hint: did you mean ~/model?\n"
        "\n"
        "error: there is no folder ~/pcis\n"
        " ┌ run.toml:9:8\n"
        '9│ path = "pcis"\n'
        " │        ^^^^^^\n"
        "hint: did you mean ~/pics?\n"
        "\n"
        "error: there is no prompt file ~/p.txt\n"
        "  ┌ run.toml:13:15\n"
        '13│ prompt_file = "p.txt"\n'
        "  │               ^^^^^^^"
    )


def test_bad_pictures_are_named(place: Place) -> None:
    whole = (place.folder / "pics" / "0.png").read_bytes()
    (place.folder / "pics" / "0.png").write_bytes(whole[: len(whole) // 2])
    (place.folder / "pics" / "1.png").write_bytes(b"not a picture")
    (place.folder / "pics" / "2.png").write_bytes(b"")
    (place.folder / "pics" / "3.txt").unlink()
    (place.folder / "pics" / "4.txt").write_bytes(b"\xff\xff")
    text = prepared_errors(place, MINIMAL)
    assert text.startswith("error: 5 items cannot be used:\n")
    assert "pics/0.png cannot be decoded: image file is truncated" in text
    assert "pics/1.png cannot be decoded: its content is no picture of a known format" in text
    assert "pics/2.png cannot be decoded: it is empty" in text
    assert "pics/3.png has no caption file (3.txt), and its source no class_tokens" in text
    assert "pics/4.png has a caption file that cannot be used: 4.txt is not UTF-8 (byte 0)" in text
    assert text.endswith('hint: mend or remove them, or set dataset.on_bad_item = "skip" to leave them out')
    skipped = prepared(place.text(MINIMAL.replace("[dataset]\n", '[dataset]\non_bad_item = "skip"\n')))
    assert len(skipped.collection.items) == 5
    assert len(skipped.collection.bad) == 5


def test_links_to_nothing_and_folders_named_like_pictures_are_named(place: Place) -> None:
    for name in ("0.png", "1.txt"):
        (place.folder / "pics" / name).unlink()
        (place.folder / "pics" / name).symlink_to(place.folder / "nowhere")
    (place.folder / "pics" / "folder.png").mkdir()
    text = prepared_errors(place, MINIMAL)
    assert text.startswith(
        "error: 3 items cannot be used:\n"
        "  pics/0.png cannot be read: No such file or directory\n"
        "  pics/1.png has a caption file that cannot be used: 1.txt cannot be read: No such file or directory\n"
        "  pics/folder.png cannot be read: it is a folder, not a file\n"
    )
    assert prepared_errors(place, MINIMAL) == text, "also when nothing has changed since"


def test_a_model_that_cannot_be_read_brings_no_errors_after_it(place: Place) -> None:
    (place.folder / "broken.safetensors").write_bytes(b"x" * 50)
    (place.folder / "pics" / "1.png").write_bytes(b"not a picture")
    text = prepared_errors(place, MINIMAL.replace('"model"', '"broken.safetensors"'))
    assert [line for line in text.splitlines() if line.startswith("error")][1:] == ["error: 1 item cannot be used:"]


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda folder: None, "it is empty"),
        (lambda folder: (folder / "a.psd").write_bytes(b""), "it holds only .psd"),
        (lambda folder: (folder / "cats").mkdir(), "has no number of repeats in its name"),
    ],
)
def test_a_folder_without_pictures_says_why(place: Place, make: Any, part: str) -> None:
    (place.folder / "bare").mkdir()
    make(place.folder / "bare")
    assert part in prepared_errors(place, MINIMAL.replace('"pics"', '"bare"'))


def test_an_output_folder_that_cannot_be_written(place: Place) -> None:
    (place.folder / "taken").write_text("a file")
    text = prepared_errors(place, MINIMAL.replace('name = "t"', 'name = "t"\noutput_dir = "taken/runs"'))
    assert text == (
        "error: ~/taken/runs cannot be written: ~/taken is a file\n"
        " ┌ run.toml:4:14\n"
        '4│ output_dir = "taken/runs"\n'
        " │              ^^^^^^^^^^^^\n"
        "hint: choose another folder"
    )


def test_nothing_left_after_holding_out(place: Place) -> None:
    text = prepared_errors(place, MINIMAL + "[dataset.held_out]\ncount = 10\n")
    assert "10 of 10 items would be held out; none is left to train on" in text


def test_settings_are_checked_like_the_file(place: Place) -> None:
    file = place.text(MINIMAL)
    assert load(file, ["training.learning_rate=1e-3"]).require().training.learning_rate == 1e-3
    assert load(file, ["run.name=other"]).require().run.name == "other"
    assert load(file, ["dataset.sources.0.repeats=3"]).require().dataset.sources[0].repeats == 3
    assert rendered(file, "training.learning_rate=fast") == (
        'error: `training.learning_rate` must be a number above 0 and of at most 1000, not the text "fast"\n'
        " ┌ --set training.learning_rate=fast\n"
        "hint: `runner explain training.learning_rate` says more"
    )
    with pytest.raises(UsageError, match=r"--set training: write it as section\.key=value"):
        load(file, ["training"])
    with pytest.raises(UsageError, match="there is no `7`"):
        load(file, ["dataset.sources.7.path=x"])


# --- schema -----------------------------------------------------------------------------------------------------------


def test_every_key_has_documentation_and_an_effect() -> None:
    for key in all_keys().values():
        assert len(key.documentation) > 3, key.dotted
        assert key.effect in ("trajectory", "bits", "none"), key.dotted
        assert set(docstrings(key.owner)) >= set(key.owner.model_fields)
    assert len(leaf_keys()) > 120


def test_defaults_have_the_types_of_their_keys() -> None:
    """`0` as the default of a float would hash otherwise than a written `0`, which is read as 0.0."""
    for key in leaf_keys():
        if not key.required and isinstance(key.default, int) and not isinstance(key.default, bool):
            annotation = str(key.owner.model_fields[key.path[-1]].annotation)
            assert "float" not in annotation, key.dotted


def test_schemas_import_with_pydantic_only() -> None:
    """The package must be usable where nothing but pydantic is installed."""
    code = (
        "import sys\n"
        "class Only:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        top = name.split('.')[0]\n"
        "        allowed = {'schemas', 'pydantic', 'pydantic_core', 'annotated_types', 'typing_extensions', 'typing_inspection'}\n"
        "        if top not in allowed and top not in sys.stdlib_module_names: raise ImportError(name)\n"
        "import sysconfig; sysconfig.get_config_vars()  # a generated module that is in no list of names\n"
        "sys.meta_path.insert(0, Only())\n"
        "from schemas import RunConfig\n"
        "import schemas.walk\n"
        "schemas.walk.all_keys(); RunConfig.model_json_schema()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_json_schema_accepts_what_pydantic_accepts() -> None:
    from jsonschema import Draft7Validator

    schema = json.loads(schema_text())
    Draft7Validator.check_schema(schema)
    good = tomli.loads((DATA / "quickstart.toml").read_text())
    Draft7Validator(schema).validate(good)
    good["training"]["lerning_rate"] = 1
    assert not Draft7Validator(schema).is_valid(good)


def test_committed_files_made_from_the_schema_are_current() -> None:
    from tools.make_docs import generated

    for file, text in generated().items():
        assert file.read_text(encoding="utf-8") == text, f"{file} is stale: python -m tools.make_docs"


@pytest.mark.parametrize("file", sorted(ROOT.glob("recipes/*/run.toml")), ids=lambda file: file.parent.name)
def test_recipes_are_valid(file: Path) -> None:
    assert not load(file).errors


def test_the_contracts_quickstart_is_valid() -> None:
    assert not load(DATA / "quickstart.toml").errors


# --- fmt --------------------------------------------------------------------------------------------------------------

UNTIDY = """schema_version=1
# the run

[run]
name   =   "t"   # its name
seed = 42


[model]
family = "sd15"
checkpoint = "model"
dtype = "fp32"
[dataset]
[[dataset.sources]]
path = "pics"
# how long
[training]
max_train_steps = 4
learning_rate = 1e-4
"""


def test_tidy() -> None:
    tidy = tidy_text(UNTIDY)
    assert tidy.startswith('schema_version = 1\n# the run\n\n[run]\nname = "t"   # its name\nseed = 42\n\n[model]\n')
    assert "\n\n# how long\n[training]\n" in tidy
    assert tidy_text(tidy) == tidy
    assert tomli.loads(tidy) == tomli.loads(UNTIDY)


def test_minimal_takes_out_defaults_and_keeps_comments() -> None:
    text = minimal_text(UNTIDY)
    assert "seed" not in text
    assert "learning_rate" not in text
    assert "# its name" in text
    assert RunConfig.model_validate(tomli.loads(text)) == RunConfig.model_validate(tomli.loads(UNTIDY))


def test_full_spells_everything_out(place: Place) -> None:
    run = prepared(place.text(UNTIDY))
    text = tidy_text(full_text(UNTIDY, run.config, load(place.file).require()))
    again = prepared(place.text(text))
    assert "# its name" in text
    assert 'sampler = "ddim"' in text
    from runner.plan.compile import compile_graph

    assert compile_graph(again).fingerprint("train") == compile_graph(run).fingerprint("train")
