"""What a person types that other tools take, and what the answer is: values, tables, paths, words to look for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.config.foreign import FOREIGN_KEYS
from runner.config.foreign_values import FOREIGN_VALUES
from runner.config.load import load
from runner.config.optimizer_kinds import OPTIMIZERS
from runner.config.schema import all_keys
from runner.errors import InvalidConfig
from tests.inprocess import Verbs, prepared, verb
from tests.support import Place

__all__ = ["verb"]
HEAD = 'schema_version = 1\n[run]\nname = "t"\n[model]\nfamily = "sd15"\ncheckpoint = "model"\n[[dataset.sources]]\npath = "pics"\n'
TRAINING = "[training]\nmax_train_steps = 6\n"


def said(tmp_path: Path, text: str) -> list[tuple[str, str | None]]:
    """(message, hint) of each finding in a run.toml."""
    file = tmp_path / "run.toml"
    file.write_text(text)
    try:
        return [(item.message, item.hint) for item in load(file).diagnostics]
    except InvalidConfig as error:
        return [(item.message, item.hint) for item in error.diagnostics]


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (
            HEAD + TRAINING + '[training.scheduler]\ntype = "constant_with_warmup"\n',
            '`training.scheduler.type` must be one of "constant", "linear", "cosine", "cosine_with_restarts", "polynomial", '
            '"rex", "warmup_stable_decay", "piecewise", not the text "constant_with_warmup"',
            'here: "constant" and warmup_steps = the steps of the warm-up',
        ),
        (
            HEAD + TRAINING + 'optimizer = "AdamW8bit"\n',
            '`training.optimizer` must be a table, not the text "AdamW8bit"',
            'write [training.optimizer] with type = "adamw8bit"',
        ),
        (
            HEAD + TRAINING + 'optimizer = "AdaFactor"\n',
            '`training.optimizer` must be a table, not the text "AdaFactor"',
            'write [training.optimizer] with type = "adafactor"',
        ),
        (
            HEAD + TRAINING + 'scheduler = "cosine"\n',
            '`training.scheduler` must be a table, not the text "cosine"',
            'write [training.scheduler] with type = "cosine"',
        ),
        (
            HEAD + TRAINING + "ema = 0.999\n",
            "`training.ema` must be a table, not 0.999",
            "write [training.ema] with decay = 0.999",
        ),
        (
            HEAD + TRAINING + '[dataset]\nresolution = "1024,1024"\n',
            '`dataset.resolution` must be an integer from 8 to 16384 or a list of 2 integers from 8 to 16384, not the text "1024,1024"',
            "write it as two numbers: resolution = [1024, 1024]",
        ),
        (
            HEAD + TRAINING + '[dataset]\nresolution = "768"\n',
            '`dataset.resolution` must be an integer from 8 to 16384 or a list of 2 integers from 8 to 16384, not the text "768"',
            "write it without quotes: resolution = 768",
        ),
        (
            HEAD.replace('"t"', '"my cat (v2)"') + TRAINING,
            '`run.name` must be letters, digits, and `.`, `_`, `-` between them, 100 at most, not the text "my cat (v2)"',
            'write name = "my-cat-v2"',
        ),
        (
            HEAD + TRAINING + '[dataset]\nvideo_directory = "clips"\n',
            "unknown key `video_directory` in [dataset]",
            "here this is `dataset.sources.path`",
        ),
        (
            HEAD.replace('"model"', '"C:\\pics\\x.safetensors"') + TRAINING,
            "not valid TOML: unescaped '\\' in a string",
            "in double quotes a backslash begins an escape: write 'C:\\pics\\x.safetensors' in single quotes, "
            'or "C:/pics/x.safetensors"',
        ),
        (
            HEAD.replace('"model"', '"C:\\temp\\new.ckpt"') + TRAINING,
            "`model.checkpoint` has a character in it that no path has: 'C:\\temp\\new.ckpt'",
            "in double quotes a backslash begins an escape: write 'C:\\temp\\new.ckpt' in single quotes, or \"C:/temp/new.ckpt\"",
        ),
        (
            HEAD + TRAINING + '[training.optimizer]\ntype = "prodigy"\n[network]\nlora_plus_ratio = 16\n',
            'the optimizer "prodigy" finds one learning rate for everything; lora_plus_ratio would be a second one',
            "take lora_plus_ratio out, or use adamw",
        ),
        (
            HEAD + TRAINING + '[sampling]\nprompts = ["a cat"]\n',
            '`sampling.prompts` must be an array of tables, not the text "a cat"',
            'write [[sampling.prompts]] with prompt = "a cat", once for each',
        ),
        (
            HEAD + TRAINING + '[dataset.held_out]\npath = "a\\tb"\n',
            "`dataset.held_out.path` has a character in it that no path has: 'a\\tb'",
            "in double quotes a backslash begins an escape: write 'a\\tb' in single quotes, or \"a/tb\"",
        ),
    ],
)
def test_values_of_other_tools(tmp_path: Path, text: str, message: str, hint: str) -> None:
    assert (message, hint) in said(tmp_path, text)


@pytest.mark.parametrize(
    "typed", ["PagedAdamW8bit", "AdamW8bit", "Prodigy", "AdaFactor", "Adafactor", "Lion8bit", "adam"]
)
def test_optimizers_of_other_tools_name_ours(tmp_path: Path, typed: str) -> None:
    found = said(tmp_path, HEAD + TRAINING + f'[training.optimizer]\ntype = "{typed}"\n')
    meant = {"pagedadamw8bit": "paged_adamw8bit", "adam": "adamw"}.get(typed.lower(), typed.lower())
    assert meant in OPTIMIZERS
    assert found[0][1] is not None
    assert f'"{meant}"' in found[0][1], found


def test_every_foreign_word_leads_to_a_key_that_there_is() -> None:
    keys = all_keys()
    for name, ours in FOREIGN_KEYS.items():
        assert " " in ours or ours in keys or ours.startswith("[["), (name, ours)
    for dotted, values in FOREIGN_VALUES.items():
        for typed, hint in values.items():
            assert typed == typed.lower()
            assert f'"{typed}"' not in keys[dotted].type_text, (dotted, typed, "is ours")
            first = hint.partition('"')[2].partition('"')[0]
            if hint.startswith('"'):
                assert f'"{first}"' in keys[dotted].type_text, (dotted, typed, hint)


def problem(place: Place, **changes: object) -> tuple[str, str | None]:
    place.write(changes)
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.file)
    return caught.value.diagnostics[0].message, caught.value.diagnostics[0].hint


def test_missing_files_are_named_with_what_is_near(place: Place) -> None:
    models = place.folder / "models"
    models.mkdir()
    (models / "realistic.safetensors").write_bytes(b"")
    near = f"did you mean {models / 'realistic.safetensors'}?"
    for name in ("models/realistic.pt", "models/Realistic.safetensors", "models/realistc.safetensors"):
        assert problem(place, model={"checkpoint": name}) == (f"there is no file or folder {place.folder / name}", near)
        assert problem(place, model={"vae": name}) == (f"there is no file or folder {place.folder / name}", near)
        assert problem(place, network={"init_from": name}) == (f"there is no file {place.folder / name}", near)
        assert problem(place, network={"base_weights": [name]}) == (f"there is no file {place.folder / name}", near)
    assert problem(place, model={"checkpoint": "weights/x.pt"}) == (
        f"there is no file or folder {place.folder / 'weights' / 'x.pt'}",
        f"there is no folder {place.folder / 'weights'}",
    )
    assert problem(place, model={"checkpoint": "models/zzz"}) == (f"there is no file or folder {models / 'zzz'}", None)
    message, hint = problem(place, model={"checkpoint": "stabilityai/sdxl-turbo"})
    assert "is not in the local hub cache" in message
    assert (
        hint == "nothing is downloaded while running; fetch it once: hf download stabilityai/sdxl-turbo --revision main"
    )


def test_prompt_files_and_run_files_that_are_missing(place: Place, verb: Verbs) -> None:
    (place.folder / "prompts.txt").write_text("a cat\n")
    near = f"did you mean {place.folder / 'prompts.txt'}?"
    assert problem(place, sampling={"prompt_file": "prompt.txt"}) == (
        f"there is no prompt file {place.folder / 'prompt.txt'}",
        near,
    )
    assert verb(place, "plan", "runn.toml").err == (
        f"error: there is no file runn.toml\nhint: did you mean {place.file}?\n\n"
    )


def test_a_folder_of_shards_is_taken_where_a_first_shard_is(family_place: Callable[..., Place]) -> None:
    from safetensors.torch import load_file, save_file

    place = family_place("framepack")
    whole = place.folder / "model" / "text_encoder" / "model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    shards = place.folder / "shards"
    shards.mkdir()
    for number, part in enumerate((names[::2], names[1::2]), 1):
        save_file({name: tensors[name] for name in part}, shards / f"model-{number:05d}-of-00002.safetensors")
    first = shards / "model-00001-of-00002.safetensors"
    from runner.families.locate import locate_model

    assert locate_model("shards", place.folder, None, place.folder, ("model", "text_encoder_1")) == first
    shutil.copy(place.folder / "model" / "text_encoder" / "config.json", shards)
    assert locate_model("shards", place.folder, None, place.folder, ("model", "text_encoder_1")) == shards


def test_explain_finds_words(place: Place, verb: Verbs) -> None:
    for word, parts in {
        "caption": (
            "keys named caption\n",
            "  dataset.caption_separator ",
            "  model.max_token_length ",
            "caption_ext, ",
        ),
        "batch": (
            "  dataset.batch_size ",
            "  vae_batch_size: caching.latent_batch_size\n",
            "gradient_accumulation_steps",
        ),
        "lora": ("  network.lora_plus_ratio ", "  lora_rank", "  network.type "),
        "wandb": ("here: there is no wandb: events.jsonl and, with training.logging.tensorboard, TensorBoard files",),
        "network_dim": ("here: network.rank  ",),
        "save-every": ("  save_every_n_steps: training.checkpoints.every_n_steps\n",),
    }.items():
        text = verb(place, "explain", word).ok().out
        for part in parts:
            assert part in text, (word, part, text)
    nothing = verb(place, "explain", "xyzzy")
    assert nothing.code == 64
    assert nothing.err == (
        "error: there is no key 'xyzzy', and nothing is said of it\nhint: `runner explain training` lists a section's keys\n\n"
    )


def test_every_option_of_sample_is_explained() -> None:
    import click

    from runner.cli.sample import command

    assert isinstance(command, click.Command)
    silent = [option.name for option in command.params if isinstance(option, click.Option) and not option.help]
    assert silent == []


def test_copy_to_a_file_says_what_to_type(place: Place, verb: Verbs) -> None:
    result = verb(place, "copy", "framepack-lora", "mine.toml")
    assert result.code == 64
    assert result.err == (
        "error: DESTINATION is a folder, and mine.toml is the name of a file\n"
        "hint: type `runner copy framepack-lora framepack-lora`: it makes framepack-lora/run.toml and what stands beside it\n\n"
    )
    assert (
        "type `runner copy sd15-lora mine`: it makes mine/run.toml"
        in verb(place, "copy", "sd15-lora", "mine/run.toml").err
    )


def test_the_tables_of_the_readme_are_whole() -> None:
    """No empty line inside a table, and every exit code is there."""
    from runner.errors import Exit
    from tests.support import ROOT

    lines = (ROOT / "README.md").read_text().splitlines()
    tables = [
        number for number, line in enumerate(lines) if line.startswith("|") and not lines[number - 1].startswith("|")
    ]
    for number in tables:
        assert lines[number + 1].startswith("|---"), lines[number]
    for code in Exit:
        assert any(line.startswith(f"| {code.value} |") for line in lines), code
