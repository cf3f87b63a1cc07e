"""`runner sample` with video models: every way to ask, what is written, LoRA files, batch files and the interactive mode."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image
from safetensors import safe_open

from tests.support import Place, draw_clips, draw_pictures, family_changes
from tests.test_video import changes_of

Make = Callable[..., Place]


@pytest.fixture
def done(family_place: Make) -> Callable[[str], Place]:
    """Kind → a trained run of FramePack."""

    def make(kind: str) -> Place:
        place = family_place("framepack")
        draw_clips(place.folder / "clips", [30, 21])
        draw_pictures(place.folder / "controls", 10, seed=8)
        for name, number in (("start", 0), ("other", 1)):
            Image.open(place.folder / "pics" / f"{number}.png").resize((64, 48)).save(place.folder / f"{name}.png")
        place.base = family_changes("framepack")
        place.write(changes_of(kind, dataset={"held_out": None}, training={"max_train_steps": 2}))
        place.run("apply", "--target", "train").ok()
        return place

    return make


def sample(place: Place, *arguments: str, text: str | None = None) -> list[Path]:
    """The files that `runner sample` says it wrote."""
    which = () if "--checkpoint" in arguments else ("--checkpoint", "last")
    out = place.run("sample", *arguments, *which, text=text).ok().out
    return [place.folder / line for line in out.splitlines()]


def frames_of(file: Path) -> int:
    with av.open(str(file)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_i2v_from_the_command_line(done: Callable[[str], Place]) -> None:
    place = done("i2v")
    common = [
        "--prompt",
        "0:a thing;;;1:another",
        "--image",
        "0:start.png;;;1:other.png",
        "--num-inference-steps",
        "2",
        "--seed",
        "3",
    ]
    (first,) = sample(place, *common, "--sections", "2", "--out", "a")
    assert first.suffix == ".mp4"
    assert frames_of(first) == 17
    settings = json.loads(first.with_suffix(".json").read_text())
    said = (settings["seed"], settings["sections"], settings["sectioned"])
    assert said == (3, 2, ["a thing", "another"])
    assert str(place.folder) not in first.with_suffix(".json").read_text(), "no paths of the machine"
    (again,) = sample(place, *common, "--sections", "2", "--out", "b")
    assert again.read_bytes() == first.read_bytes()
    (ended,) = sample(
        place, *common, "--sections", "2", "--end-image", "other.png", "--latent-paddings", "0,0", "--out", "c"
    )
    assert ended.read_bytes() != first.read_bytes()
    (guided,) = sample(place, *common, "--sections", "2", "--cfg-scale", "2", "--guidance-rescale", "0.5", "--out", "d")
    assert guided.read_bytes() != first.read_bytes()
    both = sample(
        place,
        *common,
        "--seconds",
        "0.5",
        "--output-type",
        "both",
        "--vae-chunk-size",
        "8",
        "--vae-tile-size",
        "64",
        "--blocks-to-swap",
        "1",
        "--out",
        "e",
    )
    assert [file.name.rpartition("-prompt-01")[2] for file in both] == [".latent.safetensors", ".mp4"]
    with safe_open(both[0], "pt") as stream:
        assert stream.get_tensor("latent").shape == (1, 4, 5, 4, 4)
    pictures = sample(place, *common, "--sections", "2", "--output-type", "latent_images", "--out", "f")
    assert len([file for file in pictures if file.suffix == ".png"]) == 17
    (latent,) = sample(place, *common, "--sections", "2", "--output-type", "latent", "--out", "g")
    assert latent.suffix == ".safetensors"


def test_batch_files_and_interactive(done: Callable[[str], Place]) -> None:
    place = done("i2v")
    (place.folder / "batch.txt").write_text(
        "# two videos\na dog --i start.png --vs 1 --d 1 --s 2\n\na cat --i other.png --vs 2 --d 2 --s 2\n"
    )
    batch = sample(place, "--prompt-file", "batch.txt", "--dialect", "framepack", "--out", "batch")
    assert [frames_of(file) for file in batch] == [9, 17]
    lines = "a dog --i start.png --vs 1 --d 1 --s 2\na dog --x 2\na cat --i other.png --vs 2 --d 2 --s 2\n"
    result = place.run(
        "sample", "--checkpoint", "last", "--interactive", "--dialect", "framepack", "--out", "typed", text=lines
    )
    assert result.code == 0, result.err
    typed = [place.folder / line for line in result.out.splitlines()][-2:]
    assert [file.read_bytes() for file in typed] == [file.read_bytes() for file in batch], (
        "the same seeds, the same videos"
    )
    assert "unknown option `--x`" in result.err


def test_lora_files_and_merged_models(done: Callable[[str], Place]) -> None:
    place = done("i2v")
    place.run("export", "--format", "kohya", "--to", "own.safetensors").ok() if (
        place.output / "best.safetensors"
    ).exists() else place.run("apply").ok()
    own = place.output / "best.safetensors"
    common = [
        "--checkpoint",
        "base",
        "--prompt",
        "a",
        "--image",
        "start.png",
        "--sections",
        "1",
        "--num-inference-steps",
        "2",
        "--seed",
        "1",
    ]
    plain, merged, half = (
        sample(place, *common, *more, "--out", name)[0].read_bytes()
        for name, more in (
            ("p", ()),
            ("m", ("--lora", str(own))),
            ("h", ("--lora", f"{own}:0.5", "--include", "single")),
        )
    )
    assert len({plain, merged, half}) == 3
    (whole,) = sample(place, "--checkpoint", "base", "--lora", str(own), "--save-merged", "merged.safetensors")
    with safe_open(whole, "pt") as stream:
        assert "transformer_blocks.0.attn.to_q.weight" in stream.keys()  # noqa: SIM118
    (place.folder / "dit").mkdir()
    (place.folder / "dit" / "diffusion_pytorch_model.safetensors").write_bytes(whole.read_bytes())
    (place.folder / "dit" / "config.json").write_bytes(
        (place.folder / "model" / "transformer" / "config.json").read_bytes()
    )
    parts: dict[str, Any] = dict.fromkeys(("vae", "text_encoder_1", "text_encoder_2", "image_encoder"), "model")
    place.write(changes_of("i2v", dataset={"held_out": None}, model={"variant": "i2v", "checkpoint": "dit", **parts}))
    again = place.run("sample", *common, "--out", "q")
    assert again.code == 0, again.err


def test_one_frame_from_the_command_line(done: Callable[[str], Place]) -> None:
    place = done("one_frame")
    Image.linear_gradient("L").resize((64, 48)).save(place.folder / "mask.png")
    common = ["--prompt", "a", "--num-inference-steps", "2", "--seed", "1", "--one-frame"]
    made = {
        name: sample(place, *common, *more, "--out", name)[0]
        for name, more in {
            "plain": ("target_index=1,control_index=0", "--control-image", "start.png"),
            "two": (
                "target_index=1,control_index=0;5,no_2x,no_4x",
                "--control-image",
                "start.png",
                "--control-image",
                "other.png",
            ),
            "masked": ("target_index=1,control_index=0", "--control-image", "start.png", "--control-mask", "mask.png"),
            "image": ("default", "--image", "start.png"),
            "rope": ("default", "--image", "start.png", "--rope-scaling-timestep-threshold", "500"),
        }.items()
    }
    assert {file.suffix for file in made.values()} == {".png"}
    assert len({file.read_bytes() for file in made.values()}) == 5
    text = Image.open(made["plain"]).text["runner"]  # type: ignore[attr-defined]
    assert json.loads(text)["one_frame"] == [1, [0], False, False, False, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a"], "error: prompt 1: FramePack makes videos from a picture, and this prompt has none"),
        (["--prompt", "a", "--image", "no.png"], "error: prompt 1: there is no picture"),
        (
            ["--prompt", "0:a;;;4:b", "--image", "start.png", "--sections", "2"],
            "names section 4 of a video of 2 sections",
        ),
        (
            ["--prompt", "a", "--image", "start.png", "--latent-paddings", "a"],
            "error: --one-frame or --latent-paddings: invalid literal",
        ),
        (
            ["--prompt", "a", "--image", "start.png", "--blocks-to-swap", "40"],
            "error: the denoiser has 4 blocks; some must stay",
        ),
    ],
)
def test_wrong_requests(done: Callable[[str], Place], arguments: list[str], message: str) -> None:
    place = done("i2v")
    result = place.run("sample", *arguments)
    assert message in result.err, result.err
    assert "Traceback" not in result.err
