"""From a bare file to a run: `runner new`, `runner plan --fit`, and the recipes against stand-ins of full-size files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli
from PIL import Image

from runner.errors import Invalid
from runner.families.detect import detect
from runner.plan.estimate import figures
from runner.plan.fit import fit
from tests.inprocess import planned, planned_fast
from tests.stand_in import write_stand_in
from tests.support import ROOT, Place, draw_pictures, new_place

GB = 10**9


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins of the three full-size checkpoints, pictures, and a T5 tokenizer."""
    from runner.families.parts.tiny import write_t5_tokenizer

    folder = tmp_path_factory.mktemp("stand_ins")
    for name in ("sd15", "sdxl", "sd3"):
        write_stand_in(folder / f"{name}.safetensors", name)
    write_stand_in(folder / "sd3_without_t5.safetensors", "sd3", ("t5xxl",))
    write_stand_in(folder / "sd3_without_text.safetensors", "sd3", ("text_encoders",))
    write_t5_tokenizer(folder / "t5-tokenizer", 32_100)
    draw_pictures(folder / "images", 12, size=512)
    return folder


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_a_file_tells_its_family(files: Path, name: str, tmp_path: Path) -> None:
    assert detect(str(files / f"{name}.safetensors")) == (name, files / f"{name}.safetensors")


def test_files_of_no_family_say_what_they_are(files: Path, tmp_path: Path) -> None:
    cases: dict[str, tuple[str, dict[str, list[int]], tuple[str, ...]]] = {
        "inpainting": ("sdxl", {"model.diffusion_model.input_blocks.0.0.weight": [320, 9, 3, 3]}, ()),
        "an SDXL refiner": ("sdxl", {"conditioner.embedders.0.model.ln_final.weight": [1280]}, ("conditioner",)),
        "a Stable Diffusion 2 checkpoint": ("sd15", {"cond_stage_model.model.ln_final.weight": [1024]}, ()),
        "a LoRA file": ("sd15", {"lora_unet_x.lora_down.weight": [1, 1]}, ("model",)),
        "an autoencoder only": ("sd15", {}, ("diffusion_model", "cond_stage")),
        "a text encoder only": ("sd15", {}, ("diffusion_model", "first_stage")),
    }
    for words, (family, extra, without) in cases.items():
        file = write_stand_in(tmp_path / "x.safetensors", family, without, extra)
        with pytest.raises(Invalid, match=words):
            detect(str(file))


@pytest.mark.parametrize(
    ("name", "method"),
    [("sd15", "lora"), ("sdxl", "lora"), ("sdxl", "full"), ("sd3_without_t5", "lora"), ("sd3_without_t5", "full")],
)
def test_a_new_run_is_valid_and_short(files: Path, tmp_path: Path, name: str, method: str) -> None:
    place = Place(tmp_path)
    result = place.run(
        "new",
        "--model",
        str(files / f"{name}.safetensors"),
        "--images",
        str(files / "images"),
        "--method",
        method,
        "--memory",
        "24GB",
    ).ok()
    assert result.out.strip() == "run.toml"
    document = tomli.loads(place.file.read_text())
    assert len(place.file.read_text().splitlines()) < 60
    assert document["model"]["family"] == name.partition("_")[0]
    assert ("network" in document) == (method == "lora")
    run = planned_fast(place.file).prepared
    assert run.config.dataset.resolution == (
        512 if name == "sd15" else 512 // run.model.bucket_step * run.model.bucket_step
    )
    assert len(run.collection.held_out) == 0, "12 pictures are too few to hold some out"
    assert len(run.prompts) == 3
    assert "fits into 24.0 GB" in result.err
    assert place.run("new", "--model", "x", "--images", ".").code == 64, "an existing file is not overwritten"


def test_a_new_run_trains(tmp_path: Path, tiny_models: Callable[[str], Path]) -> None:
    """On the tiny models, as it was written: from a directory and a folder to the first step."""
    for name in ("sd15", "sdxl", "sd3"):
        place = new_place(tmp_path / name, tiny_models(name), 12)
        place.file.unlink()
        place.run("new", "--model", "model", "--images", "pics", "--set", "training.max_train_steps=2").ok()
        place.run("apply", "--target", "train").ok()


def test_pictures_without_captions_need_one(tmp_path: Path, tiny_models: Callable[[str], Path]) -> None:
    place = new_place(tmp_path, tiny_models("sd15"), 4)
    place.file.unlink()
    for caption in (place.folder / "pics").glob("*.txt"):
        caption.unlink()
    result = place.run("new", "--model", "model", "--images", "pics")
    assert result.code == 3
    assert "has no caption file" in result.err
    assert not place.file.exists()
    place.run("new", "--model", "model", "--images", "pics", "--class-tokens", "a shape").ok()
    assert 'class_tokens = "a shape"' in place.file.read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "nothing.safetensors", "--images", "pics"], 3, "there is no file or folder"),
        (["--model", "model", "--images", "nothing"], 3, "there is no folder"),
        (["--model", "model", "--images", "pics", "--memory", "much"], 64, "write it as 12GB"),
        (["--model", "pics", "--images", "pics"], 3, "a folder without model_index.json"),
    ],
)
def test_wrong_wishes(place: Place, arguments: list[str], code: int, message: str) -> None:
    place.file.unlink()
    result = place.run("new", *arguments)
    assert (result.code, "Traceback" in result.err) == (code, False)
    assert message in result.err
    assert not place.file.exists()


# --- fit --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method", "limit"),
    [("sdxl", "lora", 8), ("sdxl", "full", 16), ("sd3_without_t5", "lora", 9), ("sd3_without_t5", "full", 16)],
)
def test_what_the_models_fit_into(files: Path, tmp_path: Path, name: str, method: str, limit: int) -> None:
    """The aims at batch 1 and 1024 x 1024, as predicted; the proposal is what the plan then says."""
    place = Place(tmp_path)
    place.file.write_text(
        f'schema_version = 1\n[run]\nname = "t"\ndevice = "cuda"\n[model]\nfamily = "{name.partition("_")[0]}"\n'
        f'checkpoint = "{files / name}.safetensors"\n{"[network]" if method == "lora" else ""}\n'
        f'[dataset]\nresolution = 1024\n[[dataset.sources]]\npath = "{files / "images"}"\n[training]\nmax_train_steps = 10\n'
    )
    found = fit(planned_fast(place.file), limit * GB)
    assert found.after <= limit * GB
    assert found.before > found.after
    settings = [f"{key}={json.dumps(value)}" for key, value in found.settings.items()]
    again = planned_fast(place.file, *settings)
    assert fit(again, limit * GB).steps == (), "with these settings it fits as it is"
    least = fit(again, GB)
    assert least.after > GB, "and where nothing fits it says so"


def test_fit_on_the_command_line(place: Place) -> None:
    result = place.run("plan", "--fit", "1GB", "--set", "training.memory.gradient_checkpointing=false").ok()
    assert "Predicted peak on a GPU" in result.out
    record = json.loads(place.run("plan", "--fit", "12GB", "--json").ok().out)
    assert record["fit"]["fits"] is True
    assert record["fit"]["settings"] == {}
    assert place.run("plan", "--fit", "lots").code == 64


# --- recipes ----------------------------------------------------------------------------------------------------------


def recipe(name: str, folder: Path, files: Path) -> Place:
    """A recipe with stand-ins where it says its files are."""
    shutil.copytree(ROOT / "recipes" / name, folder)
    (folder / "models").mkdir()
    for model in ("sd15", "sdxl"):
        (folder / "models" / f"{model}.safetensors").symlink_to(files / f"{model}.safetensors")
    (folder / "models" / "sd3_medium_incl_clips_t5xxlfp16.safetensors").symlink_to(files / "sd3.safetensors")
    (folder / "models" / "t5-tokenizer").symlink_to(files / "t5-tokenizer")
    return Place(folder)


@pytest.mark.parametrize("name", ["sd15-lora", "sdxl-lora", "sd3-medium-lora"])
def test_a_recipe_plans(name: str, tmp_path: Path, files: Path) -> None:
    place = recipe(name, tmp_path / "run", files)
    pictures = "images/100_demo" if name != "sd3-medium-lora" else "images"
    draw_pictures(place.folder / pictures, 5, size=256)
    plan = planned_fast(place.file)
    numbers = figures(plan, None)
    if name == "sd3-medium-lora":
        assert numbers.trained_layers == 333
    else:
        assert numbers.steps == 10 * 500
        assert numbers.checkpoints == 10
        assert {target.rank for target in plan.prepared.targets} == {32}
    result = place.run("plan").ok()
    assert "warning" not in result.err


def test_the_sd3_tutorial(tmp_path: Path, files: Path) -> None:
    """476 pictures of one bucket: 794 steps an epoch, 24,000 in all, 30 checkpoints."""
    place = recipe("sd3-medium-full", tmp_path / "run", files)
    folder = place.folder / "datasets" / "fantasy_art"
    folder.mkdir(parents=True)
    for index in range(476):
        Image.new("RGB", (64, 64), (index % 256, index // 256, 7)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"k4s4, picture {index}")
    plan = planned_fast(place.file)
    numbers = figures(plan, None)
    assert (numbers.items, numbers.steps_per_epoch, numbers.steps, numbers.checkpoints) == (476, 794, 24_000, 30)
    assert numbers.buckets == [((1024, 1024), "", 476)]
    assert numbers.trainable == 2_028_328_000
    sampled = plan.graph.runtime.sample_every
    assert sampled == 200
    text = place.run("plan").ok().out
    for part in ("24,000 in all, 794 steps an epoch", "30, one each 800 steps", "Stable Diffusion 3 Medium"):
        assert part in text


@pytest.mark.parametrize(
    ("family", "file", "message"),
    [
        ("sd15", "sdxl.safetensors", "is an SDXL checkpoint; the family is sd15\n"),
        ("sdxl", "sd15.safetensors", "is a Stable Diffusion 1.5 checkpoint; the family is sdxl"),
        ("sd3", "sdxl.safetensors", "is an SDXL checkpoint; the family is sd3"),
        ("sd15", "sd3.safetensors", "is a Stable Diffusion 3 checkpoint; the family is sd15"),
        ("sd3", "sd3_without_text.safetensors", "has no text encoder (text_encoder_1)"),
        ("sd3", "sd3.safetensors", "the T5 text encoder needs its tokenizer"),
    ],
)
def test_a_checkpoint_that_is_not_of_the_family(
    place: Place, files: Path, family: str, file: str, message: str
) -> None:
    place.write({"model": {"family": family, "checkpoint": str(files / file)}})
    result = place.run("validate")
    assert result.code == 3
    assert message in result.err
    assert "run.toml:8:14" in result.err


def test_text_encoders_of_their_own(place: Place, files: Path, tiny_models: Callable[[str], Path]) -> None:
    """A single SD3 file without text encoders, and theirs from other files."""
    names = {1: "clip_l", 2: "clip_g", 3: "t5xxl"}
    model: dict[str, Any] = {
        "family": "sd3",
        "checkpoint": str(files / "sd3_without_text.safetensors"),
        "dtype": "bf16",
        "tokenizer_3": str(files / "t5-tokenizer"),
    }
    for number, name in names.items():
        others = tuple(f"text_encoders.{other}" for other in names.values() if other != name)
        file = write_stand_in(place.folder / f"{name}.safetensors", "sd3", ("diffusion_model", "first_stage", *others))
        model[f"text_encoder_{number}"] = file.name
    run = planned_fast(place.write({"model": model, "dataset": {"resolution": 512}})).prepared
    assert run.model.text_encoders == ("text_encoder_1", "text_encoder_2", "text_encoder_3")
    assert planned is not None
