"""FLUX.1's recipes plan as they stand, on files of the published keys and shapes, and `runner new` finds the family."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from runner.families.detect import detect
from runner.plan.estimate import figures
from tests.inprocess import planned_fast
from tests.stand_in import write_flux
from tests.support import ROOT, Place, draw_pictures

"""They read the digests of files of full size."""
RECIPES = {"flux-dev-lora": (494, 0), "flux-dev-full": (0, 11_901_408_320), "flux-kontext-lora": (494, 0)}
"""Recipe → layers with adapters, weights that train whole."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/, images/ and references/ as the recipes' headers ask for."""
    folder = tmp_path_factory.mktemp("recipes")
    write_flux(folder / "models")
    draw_pictures(folder / "images", 3)
    shutil.copytree(folder / "images", folder / "references")
    Image.new("RGB", (64, 48)).save(folder / "reference.png")
    return folder


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_plan_as_they_stand(models: Path, name: str) -> None:
    text = (ROOT / "recipes" / name / "run.toml").read_text(encoding="utf-8")
    file = models / f"{name}.toml"
    file.write_text(text, encoding="utf-8")
    plan = planned_fast(file, 'run.device="cuda"')
    numbers = figures(plan, None)
    layers, whole = RECIPES[name]
    assert numbers.trained_layers == layers
    assert not whole or numbers.trainable == whole
    assert plan.prepared.model.variant == ("kontext" if "kontext" in name else "dev")
    assert plan.prepared.prompts
    said = next(line for line in text.splitlines() if line.startswith("# Hardware"))
    promised = float(said.split("about ")[1].split(" GB")[0])
    assert numbers.memory.peak / 1e9 == pytest.approx(promised, rel=0.1), "what the header says"


def test_new_knows_a_bare_transformer(models: Path, tmp_path: Path) -> None:
    """With its other files named, as for any run; without them the plan says which are missing."""
    transformer = models / "models" / "flux1-dev.safetensors"
    assert detect(str(transformer)) == ("flux1", transformer)
    place = Place(tmp_path)
    missing = place.run("new", "--model", str(transformer), "--images", str(models / "images"))
    assert missing.code == 3
    assert "has no vae (vae)" in missing.err
    assert "model.vae" in missing.err
    others = {
        "vae": "ae.safetensors",
        "text_encoder_1": "clip_l.safetensors",
        "text_encoder_2": "t5xxl_fp16.safetensors",
        "tokenizer_2": "t5-tokenizer",
    }
    sets = [part for key, file in others.items() for part in ("--set", f'model.{key}="{models / "models" / file}"')]
    place.run("new", "--model", str(transformer), "--images", str(models / "images"), "--memory", "24GB", *sets).ok()
    run = planned_fast(place.file).prepared
    assert run.spec.name == "flux1"
    assert run.config.model.quantization != "none", "24 GB do not hold it in 16 bit"
