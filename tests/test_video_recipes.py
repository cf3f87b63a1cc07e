"""The recipes of video models plan as they stand, on files of the published keys and shapes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from runner.plan.estimate import figures
from tests.inprocess import planned_fast
from tests.stand_in import write_video
from tests.support import ROOT, draw_clip, draw_pictures

RECIPES = {
    "hunyuan-video-lora": 440,
    "framepack-lora": 440,
    "framepack-f1-lora": 440,
    "framepack-one-frame-lora": 440,
    "framepack-full": 0,
}
"""Recipe → layers with adapters."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/, clips/, images/ and controls/ as the recipes' headers ask for."""
    folder = tmp_path_factory.mktemp("recipes")
    for name in ("framepack", "hunyuan_video"):
        write_video(folder / "models", name)
    (folder / "models" / "hunyuan.safetensors").rename(folder / "models" / "mp_rank_00_model_states.safetensors")
    for index, frames in enumerate((80, 46)):
        draw_clip(folder / "clips" / f"{index}.mp4", frames, (64, 64), index)
        (folder / "clips" / f"{index}.txt").write_text("a thing moves")
    draw_pictures(folder / "images", 3)
    shutil.copytree(folder / "images", folder / "controls")
    Image.new("RGB", (64, 64)).save(folder / "start.png")
    return folder


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_plan_as_they_stand(models: Path, name: str) -> None:
    text = (ROOT / "recipes" / name / "run.toml").read_text(encoding="utf-8")
    text = text.replace("model_states.pt", "model_states.safetensors").replace("video-vae.pt", "video-vae.safetensors")
    file = models / f"{name}.toml"
    file.write_text(text, encoding="utf-8")
    plan = planned_fast(file, 'run.device="cuda"')
    numbers = figures(plan, None)
    assert numbers.trained_layers == RECIPES[name]
    assert numbers.trainable == (12_874_314_816 if name == "framepack-full" else numbers.trainable)
    assert plan.prepared.collection.items
    assert plan.prepared.prompts
    said = next(line for line in text.splitlines() if line.startswith("# Hardware"))
    promised = float(said.split("about ")[1].split(" GB")[0])
    assert numbers.memory.peak / 1e9 == pytest.approx(promised, rel=0.25), "what the header says"
