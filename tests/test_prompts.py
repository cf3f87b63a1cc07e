"""Prompt files of every kind, in Kohya's words and ours, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from runner.config.prompts import parse_line, read_prompt_file
from runner.errors import InvalidConfig
from runner.families.parts.weighting import parse_weights
from runner.families.prompts import ReadyPrompt
from schemas.sampling import Prompt
from tests.inprocess import prepared
from tests.support import Place

LINE = "a cat --n ugly, blurry --w 512 --h 768 --d 7 --l 6.5 --s 28 --ss k_euler_a"
EXPECTED = Prompt(
    prompt="a cat",
    negative_prompt="ugly, blurry",
    width=512,
    height=768,
    seed=7,
    cfg_scale=6.5,
    num_inference_steps=28,
    sampler="euler_a",
)


def errors(file: Path, dialect: str = "kohya") -> str:
    with pytest.raises(InvalidConfig) as caught:
        read_prompt_file(file, dialect)
    return "\n".join(item.render() for item in caught.value.diagnostics)


def test_all_files_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(f"# a comment\n\n{LINE}\n")
    keys = EXPECTED.model_dump(exclude_none=True)
    (tmp_path / "p.json").write_text(json.dumps([keys]))
    (tmp_path / "k.json").write_text(
        json.dumps(
            [
                {
                    "prompt": "a cat",
                    "negative_prompt": "ugly, blurry",
                    "width": 512,
                    "height": 768,
                    "seed": 7,
                    "scale": 6.5,
                    "sample_steps": 28,
                    "sample_sampler": "euler_a",
                }
            ]
        )
    )
    (tmp_path / "p.toml").write_text(
        "[[prompts]]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in keys.items())
    )
    (tmp_path / "k.toml").write_text(
        '[prompt]\nwidth = 512\nheight = 768\nscale = 6.5\nsample_steps = 28\nsample_sampler = "k_euler_a"\n[[prompt.subset]]\nprompt = "a cat"\nnegative_prompt = "ugly, blurry"\nseed = 7\n'
    )
    for file in sorted(tmp_path.iterdir()):
        assert read_prompt_file(file, "kohya") == [EXPECTED], file.name


def test_words_with_dashes_are_no_options() -> None:
    assert parse_line("a well-known --old-- thing", "kohya").prompt == "a well-known --old-- thing"


def test_errors_name_line_and_column(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("fine\na cat --x 3\na dog --w wide\n")
    assert errors(file) == (
        "error: unknown option `--x`\n"
        " ┌ p.txt:2:7\n"
        "2│ a cat --x 3\n"
        " │       ^^^\n"
        'hint: options of the dialect "kohya" are --w (width), --h (height), --d (seed), --s (num_inference_steps), '
        "--l (cfg_scale), --n (negative_prompt), --ss (sampler)\n"
        "error: option `--w` (width): must be an integer, not 'wide'\n"
        " ┌ p.txt:3:7\n"
        "3│ a dog --w wide\n"
        " │       ^^^"
    )


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("p.txt", "a --w 1 --w 2", "stands twice"),
        ("p.txt", "a --w 3", "must be at least 8"),
        ("p.txt", "a --w", "its value is missing"),
        ("p.txt", "a --f 25", "--f is frames in the video tools; this family makes stills"),
        ("p.txt", "a --ss eulr", 'did you mean "euler"?'),
        ("p.json", "{", "not valid JSON"),
        ("p.json", '{"a": 1}', "must be a list of objects"),
        ("p.json", '[{"prompt": "a", "widht": 3}]', "unknown key `widht`"),
        ("p.json", "[" * 3000, "is nested too deeply"),
        ("p.toml", "[[prompts]]\nprompt = 3\n", "must be a string, not 3"),
        ("p.toml", "x = 1\n", "has no [[prompts]]"),
        ("p.toml", "[[prompts]\n", "not valid TOML"),
        ("p.csv", "a", "prompt files end in .txt, .toml or .json"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, part: str) -> None:
    (tmp_path / name).write_text(text)
    assert part in errors(tmp_path / name)


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"caf\xe9")
    assert "p.txt is not UTF-8 (byte 3)" in errors(tmp_path / "p.txt")


def ready(place: Place) -> list[ReadyPrompt]:
    return prepared(place.file).prompts


def test_what_a_prompt_leaves_open_comes_from_sampling_and_family(place: Place) -> None:
    place.write(
        {
            "sampling": {
                "prompts": [{"prompt": "a"}, {"prompt": "b", "width": 47, "cfg_scale": 2.0}],
                "negative_prompt": "n",
                "cfg_scale": 4.0,
                "num_inference_steps": None,
            }
        }
    )
    first, second = ready(place)
    assert (first.width, first.height, first.cfg_scale, first.num_inference_steps, first.sampler) == (
        32,
        32,
        4.0,
        30,
        "ddim",
    )
    assert (second.width, second.cfg_scale, second.negative_prompt) == (46, 2.0, "n")
    assert first.seed is not None
    assert first.seed != second.seed
    assert ready(place)[0].seed == first.seed
    notes = place.run("plan").ok().out
    assert "prompt 2: 47x32 is made as 46x32 (multiples of 2)" in notes


def test_a_drawn_seed_is_drawn_once(place: Place) -> None:
    place.write({"sampling": {"prompts": [{"prompt": "a", "seed": -1}]}})
    place.run("apply").ok()
    seeds = json.loads((place.output / "seeds.json").read_text())["seeds"]
    assert place.run("plan", "--detailed-exitcode").code == 0
    place.run("apply", "--yes", "--set", "training.max_train_steps=8").ok()
    assert json.loads((place.output / "seeds.json").read_text())["seeds"] == seeds


def test_prompts_of_a_file_are_found_at_plan_time(place: Place) -> None:
    (place.folder / "prompts.txt").write_text("a cat --q 3\n")
    place.write({"sampling": {"prompts": None, "prompt_file": "prompts.txt"}})
    result = place.run("plan")
    assert result.code == 3
    assert "┌ prompts.txt:1:7" in result.err
    place.write({"sampling": {"prompts": None, "prompt_file": "gone.txt"}})
    assert "there is no prompt file" in place.run("validate").err


def test_weights_of_words() -> None:
    assert parse_weights("a (b) c") == [("a ", 1.0), ("b", 1.1), (" c", 1.0)]
    assert parse_weights("((b))") == [("b", pytest.approx(1.21))]
    assert parse_weights("[b]") == [("b", pytest.approx(1 / 1.1))]
    assert parse_weights("(b:1.5) c") == [("b", 1.5), (" c", 1.0)]
    assert parse_weights(r"\(b\)") == [("(b)", 1.0)]
    assert parse_weights("(a (b:2)") == [("a ", 1.1), ("b", 2.2)]
    assert parse_weights("") == [("", 1.0)]


def test_batch_and_interactive_sampling(finished: Place, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a blue star --d 1\na red heart --d 2\n")
    made = (
        finished.run("sample", "--prompt-file", str(tmp_path / "p.txt"), "--out", str(tmp_path / "a"))
        .ok()
        .out.splitlines()
    )
    assert len(made) == 2
    spoken = finished.run(
        "sample",
        "--interactive",
        "--prompt",
        "a blue star --d 1",
        "--out",
        str(tmp_path / "b"),
        text="a red heart --d 2\na --x 1\n\na red heart --d 2\n",
    )
    assert spoken.code == 0, spoken.err
    assert "unknown option `--x`" in spoken.err
    pictures = [Path(line).read_bytes() for line in spoken.out.splitlines()]
    assert len(pictures) == 3
    assert pictures[0] == Path(made[0]).read_bytes()
    image = Image.open(made[1])
    assert image.info["parameters"].startswith(
        "a red heart\nSteps: 2, Sampler: ddim, CFG scale: 7.5, Seed: 2, Size: 32x32"
    )
    assert json.loads(image.info["runner"])["seed"] == 2


def picture_of(place: Place, folder: Path, *arguments: str) -> NDArray[np.int16]:
    made = place.run("sample", "--prompt", "a blue star --d 1", "--out", str(folder), *arguments).ok().out.splitlines()
    return np.asarray(Image.open(made[-1])).astype(np.int16)


@pytest.mark.slow
def test_lora_files_are_merged_for_sampling(finished: Place, tmp_path: Path) -> None:
    """The run's own LoRA merged into the base makes the checkpoint's picture; patterns and factors take from it."""
    kohya, peft = tmp_path / "kohya.safetensors", tmp_path / "peft.safetensors"
    for form, file in (("kohya", kohya), ("diffusers", peft)):
        finished.run("export", "--format", form, "--to", str(file), "--dtype", "fp32").ok()
    base = picture_of(finished, tmp_path / "base", "--checkpoint", "base")
    trained = picture_of(finished, tmp_path / "best")
    assert np.abs(trained - base).max() > 1
    on_base = ("--checkpoint", "base", "--lora")
    for number, arguments in enumerate([(str(kohya),), (str(peft),), (f"{kohya}:0.5", "--lora", f"{peft}:0.5")]):
        found = picture_of(finished, tmp_path / str(number), *on_base, *arguments)
        assert np.abs(found - trained).max() <= 1, arguments
    assert np.array_equal(picture_of(finished, tmp_path / "zero", *on_base, f"{kohya}:0"), base)
    part = picture_of(finished, tmp_path / "part", *on_base, str(kohya), "--exclude", "up_blocks")
    assert not np.array_equal(part, base)
    assert not np.array_equal(part, trained)


def test_a_merged_model_is_saved(finished: Place, tmp_path: Path) -> None:
    lora, merged, exported = (tmp_path / f"{name}.safetensors" for name in ("lora", "merged", "exported"))
    finished.run("export", "--format", "kohya", "--to", str(lora), "--dtype", "fp32").ok()
    result = finished.run("sample", "--checkpoint", "base", "--lora", str(lora), "--save-merged", str(merged)).ok()
    assert result.out.splitlines() == [str(merged)]
    dtype = prepared(finished.file).config.training.checkpoints.dtype
    finished.run("export", "--format", "single_file", "--to", str(exported), "--dtype", dtype).ok()
    ours, theirs = load_file(merged), load_file(exported)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again = finished.run("sample", "--save-merged", str(merged))
    assert (again.code, "is there already" in again.err) == (64, True)


def test_sampling_with_what_is_not_there(finished: Place) -> None:
    for arguments, code, part in (
        (("--checkpoint", "5"), 3, "there is no checkpoint 5"),
        (("--checkpoint", "gone.safetensors"), 3, "gone.safetensors"),
        (("--prompt", "a --w wide"), 3, "must be an integer"),
        (("--prompt", "a", "--sampler", "eulr"), 64, "did you mean"),
        (("--prompt", "a", "--width", "1"), 64, "--width"),
        (("--lora", "gone.safetensors:0.5"), 3, "there is no file gone.safetensors\n"),
        (("--lora", "run.toml"), 3, "run.toml"),
        (("--lora", "model/unet/diffusion_pytorch_model.safetensors"), 3, "holds no LoRA layers"),
        (("--lora", "runs/t/best.safetensors", "--include", "nothing"), 3, "leave none of the"),
        (("--lora", "runs/t/best.safetensors", "--exclude", "("), 64, "is no regular expression"),
        (("--include", "mid_block"), 64, "say --lora FILE"),
        (("--save-merged", "merged.ckpt"), 64, "is a .safetensors file"),
        (("--dialect", "english", "--prompt", "a"), 64, "dialects are kohya"),
    ):
        result = finished.run("sample", *arguments)
        assert (result.code, part in result.err) == (code, True), result.err


def test_options_without_a_prompt_are_refused(finished: Place) -> None:
    result = finished.run("sample", "--num-inference-steps", "30")
    assert (result.code, result.out) == (64, "")
    assert "--num-inference-steps is for prompts that are given here, and none is" in result.err


def test_a_store_in_nobodys_home_is_refused(place: Place) -> None:
    result = place.run("plan", env={"RUNNER_STORE": "~nobody-at-all/x"})
    assert result.code == 3
    assert "RUNNER_STORE=~nobody-at-all/x: there is no such home folder" in result.err
