"""Video models end to end, from real mp4 files on tiny models: cache, train, sample, select; killed and resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from runner.data.videos import mp4_bytes, read_clip
from runner.dataset.buckets import Fit
from runner.dataset.clips import Clip
from runner.dataset.probe import probe_video
from tests.inprocess import applied, planned, prepared, trained_bytes
from tests.support import Place, draw_clip, draw_clips, draw_pictures, family_changes, merged, run_bytes

Make = Callable[..., Place]
CLIPS: dict[str, Any] = {"path": "clips", "kind": "video"}
RUNS: dict[str, dict[str, Any]] = {
    "hunyuan_video": {
        "dataset": {"sources": [{**CLIPS, "target_frames": [1, 13], "frame_extraction": "chunk"}, {"path": "pics"}]},
        "sampling": {"prompts": [{"prompt": "a thing", "frames": 9}, {"prompt": "still"}]},
    },
    "i2v": {
        "model": {"variant": "i2v"},
        "dataset": {"sources": [{**CLIPS, "frame_extraction": "full"}]},
        "sampling": {
            "prompts": [
                {"prompt": "0:a thing;;;-1:another", "image": "start.png", "end_image": "pics/1.png", "sections": 3}
            ]
        },
    },
    "f1": {
        "model": {"variant": "f1"},
        "dataset": {"sources": [{**CLIPS, "frame_extraction": "full"}]},
        "sampling": {"prompts": [{"prompt": "a thing", "image": "start.png", "sections": 2}]},
    },
    "one_frame": {
        "dataset": {"sources": [{"path": "pics", "control_path": "controls"}, {**CLIPS, "frame_extraction": "full"}]},
        "sampling": {"prompts": [{"prompt": "a thing", "control_images": ["start.png"]}]},
    },
}


def changes_of(kind: str, **changes: Any) -> dict[str, Any]:
    common = {"network": {"rank": 2}, "training": {"max_train_steps": 4}, "dataset": {"held_out": {"count": 1}}}
    return merged(merged(common, RUNS[kind]), changes)


@pytest.fixture
def video_place(family_place: Make) -> Make:
    """Kind → a place with clips, pictures, control images and a start image."""

    def make(kind: str, **changes: Any) -> Place:
        place = family_place("hunyuan_video" if kind == "hunyuan_video" else "framepack")
        draw_clips(place.folder / "clips", [30, 21, 41, 18])
        draw_pictures(place.folder / "controls", 10, seed=8)
        Image.open(place.folder / "pics" / "0.png").resize((64, 48)).save(place.folder / "start.png")
        place.base = family_changes("hunyuan_video" if kind == "hunyuan_video" else "framepack")
        place.write(changes_of(kind, **changes))
        return place

    return make


@pytest.mark.parametrize("kind", list(RUNS))
def test_a_run_from_mp4_files_killed_and_resumed(video_place: Make, kind: str) -> None:
    calm = video_place(kind)
    calm.run("apply").ok()
    names = {path.name for path in (calm.output / "samples").iterdir()}
    assert any(name.endswith(".mp4") for name in names) == (kind != "one_frame")
    assert {path.stem for path in (calm.output / "samples").glob("*.mp4")} == {
        path.stem for path in (calm.output / "samples").glob("*.json")
    }
    assert (calm.output / "strip.png").is_file()
    assert ("<video" in (calm.output / "report.html").read_text()) == (kind != "one_frame")
    expected = run_bytes(calm.output)
    shutil.rmtree(calm.folder / ".runner")
    shutil.rmtree(calm.output)
    made = "videos:2:after" if kind != "one_frame" else "samples:2:before"
    places = ["items/latents:2:after", "states/state-00000002:1:after", f"items/{made}", "items/scores:1:after"]
    for place in places:
        assert calm.run("apply", kill=f"rename:{place}").code != 0, place
    calm.run("apply").ok()
    assert run_bytes(calm.output) == expected
    assert calm.run("plan", "--detailed-exitcode").code == 0


@pytest.mark.parametrize("kind", ["hunyuan_video", "i2v"])
def test_full_fine_tune(video_place: Make, kind: str) -> None:
    """Trains, and the file of the best is in the original layout, and trains on."""
    place = video_place(kind, network=None)
    applied(place.file)
    best = place.output / "best.safetensors"
    from runner.weights.headers import read_header

    keys = read_header(best).tensors
    wanted = (
        "double_blocks.0.img_attn_qkv.weight" if kind == "hunyuan_video" else "transformer_blocks.0.attn.to_q.weight"
    )
    assert wanted in keys
    own = "hunyuan_video" if kind == "hunyuan_video" else "framepack"
    parts = {"vae": "model", "text_encoder_1": "model", "text_encoder_2": "model"}
    more = {"image_encoder": "model"} if own == "framepack" else {}
    (place.folder / "dit").mkdir()
    (place.folder / "dit" / "diffusion_pytorch_model.safetensors").write_bytes(best.read_bytes())
    (place.folder / "dit" / "config.json").write_bytes(
        (place.folder / "model" / "transformer" / "config.json").read_bytes()
    )
    place.write(
        changes_of(
            kind,
            network=None,
            model={**RUNS[kind].get("model", {}), "checkpoint": "dit", **parts, **more},
            run={"name": "u"},
        )
    )
    assert prepared(place.file).model.components["denoiser"].parameters > 0


def test_pictures_and_clips_train_together(video_place: Make) -> None:
    place = video_place("hunyuan_video", training={"max_train_epochs": 1, "max_train_steps": None})
    plan = planned(place.file)
    layouts = {group.layout for group in plan.prepared.collection.groups}
    assert layouts == {"", "1 frame", "13 frames"}
    text = place.run("plan").ok().out
    assert "pictures and clips" in text
    assert "13 frames" in text


def test_sections_share_one_encoding(video_place: Make) -> None:
    """The clip is encoded once, whatever its sections; the held-out clip takes all its sections along."""
    place = video_place("i2v")
    run = prepared(place.file)
    items = [*run.collection.items, *run.collection.held_out]
    assert sorted(item.own.section.sections for item in items) == [2] * 4 + [3] * 3 + [5] * 5
    assert len({item.picture for item in items}) == 4
    assert len({item.digest for item in run.collection.held_out}) == 1
    applied(place.file, until="cache")
    assert len(list((run.store.root / "items" / "latents").rglob("*.safetensors"))) == 4


def test_lists_and_folders_of_pictures_are_videos(video_place: Make) -> None:
    place = video_place("hunyuan_video")
    folder = place.folder / "listed"
    draw_clip(folder / "a.mp4", 14)
    for number in range(9):
        (folder / "frames").mkdir(exist_ok=True)
        Image.new("RGB", (64, 48), (number * 20, 0, 0)).save(folder / "frames" / f"{number:03d}.png")
    lines = [{"video_path": "a.mp4", "caption": "from a file"}, {"video_path": "frames", "caption": "from pictures"}]
    (folder / "list.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    source = {"path": "listed/list.jsonl", "kind": "video", "frame_extraction": "full"}
    place.write(changes_of("hunyuan_video", dataset={"held_out": None, "sources": [source]}))
    run = prepared(place.file)
    assert {(item.text, item.clip.length) for item in run.collection.items if item.clip} == {
        ("from a file", 13),
        ("from pictures", 9),
    }
    applied(place.file, until="train")


def test_a_clip_is_read_frame_by_frame(tmp_path: Path) -> None:
    """The frames that the window and the lower fps ask for, in their order, resized and cropped."""
    path = draw_clip(tmp_path / "c.mp4", 40, fps=50)
    digest = probe_video(path).digest
    assert probe_video(path)[:4] == (digest, 64, 48, "40")
    fit = Fit((32, 32), (43, 32), (64, 48), True)
    clip = read_clip(str(path), digest, Clip(2, 5, 50.0, 24.0), fit.centre)
    assert clip.shape == (3, 5, 32, 32)
    every = read_clip(str(path), digest, Clip(0, 40, None, 24.0), fit.centre)
    kept = [index for index in range(40) if index == 0 or int(index * 24 / 50) != int((index - 1) * 24 / 50)]
    assert torch.equal(clip, every[:, kept[2:7]])


def test_a_long_video_is_not_held(tmp_path: Path) -> None:
    """Memory grows with the clip that is taken, not with the video."""
    import tracemalloc

    path = draw_clip(tmp_path / "long.mp4", 400, (128, 96))
    digest = probe_video(path).digest
    tracemalloc.start()
    probe_video(path)
    read_clip(str(path), digest, Clip(380, 5, None, 24.0), Fit((32, 32), (43, 32), (128, 96), True).centre)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400 * 128 * 96 * 3 / 4, "the video's frames are 14.7 MB"


def test_an_mp4_is_what_was_made(tmp_path: Path) -> None:
    pixels = torch.linspace(-1, 1, 5).view(1, 5, 1, 1).expand(3, 5, 32, 48).contiguous()
    content = mp4_bytes(pixels, 12.0)
    assert content == mp4_bytes(pixels, 12.0), "equal pixels give equal bytes"
    (tmp_path / "x.mp4").write_bytes(content)
    with av.open(str(tmp_path / "x.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate, stream.width, stream.height) == ("h264", 12, 48, 32)
        means = [float(np.asarray(frame.to_image()).mean()) for frame in container.decode(stream)]
    assert [round(mean / 63.75) for mean in means] == [0, 1, 2, 3, 4]


def test_one_frame_masks_take_places_out(video_place: Make) -> None:
    """A control image's transparency multiplies its latent; the target's own is stripped."""
    place = video_place("one_frame")
    for file in (place.folder / "controls").glob("*.png"):
        picture = Image.open(file).convert("RGBA")
        picture.putalpha(0)
        picture.save(file)
    place.write(changes_of("one_frame", dataset={"sources": RUNS["one_frame"]["dataset"]["sources"][:1]}))
    applied(place.file, until="cache")
    from safetensors.torch import load_file

    run = prepared(place.file)
    for file in (run.store.root / "items" / "latents").rglob("*.safetensors"):
        stored = load_file(file)
        assert not stored["controls"].any()
        assert stored["latents"].any()
        assert stored["latents"].shape[1] == 1


def test_encoding_at_each_use_trains_the_same(video_place: Make) -> None:
    """caching.latents = "memory" and "off" cut the same sections out of the same encodings."""
    from safetensors.torch import load

    place = video_place("i2v", sampling={"prompts": []})
    first = load(trained_bytes(place.file))
    for setting in ('caching.latents="memory"', 'caching.latents="off"'):
        shutil.rmtree(place.folder / ".runner")
        found = load(trained_bytes(place.file, setting))
        assert all(torch.allclose(found[name], tensor, atol=1e-5) for name, tensor in first.items()), setting


def test_an_end_image_stays_in_what_is_known(video_place: Make) -> None:
    """It is the frame after the last one, for every section that still sees so far."""
    from runner.families.framepack.prompts import FramepackPrompt
    from runner.families.framepack.sampling import generate

    run = prepared(video_place("i2v").file)
    prompt = run.prompts[0]
    assert isinstance(prompt.own, FramepackPrompt)
    seen: list[torch.Tensor] = []

    def call(x: torch.Tensor, t: torch.Tensor, conditioning: dict[str, torch.Tensor]) -> torch.Tensor:
        if float(t) == 1000.0:
            known = [conditioning["clean"][:, :, 1:], conditioning["clean_2x"], conditioning["clean_4x"]]
            seen.append(torch.cat(known, dim=2)[0, 0, :, 0, 0])
        return torch.zeros_like(x)

    shape = run.model.latent_shape((32, 32))
    pictures = {f"start.{n}": torch.full(shape, 5.0) for n in range(3)} | {
        f"image.{n}": torch.zeros(4, 20) for n in range(3)
    }
    pictures["end"] = torch.full(shape, 7.0)
    texts = {"text": torch.zeros(256, 24), "mask": torch.ones(256), "pooled": torch.zeros(16)}
    latents = generate(
        call,
        {"denoiser": type("Denoiser", (), {})()},
        prompt,
        lambda _: texts,
        pictures,
        run.model,
        torch.device("cpu"),
    )
    assert latents.shape[2] == 3 * 2 + 1
    assert float(latents[0, 0, 0, 0, 0]) == 5.0
    assert [int((row == 7.0).nonzero()[0]) for row in seen] == [0, 2, 4]
    assert all(not row[index + 1 :].any() for row, index in zip(seen, (0, 2, 4), strict=True))
