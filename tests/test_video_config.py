"""What a user of video models writes: prompts in three dialects, dataset files of musubi-tuner, and what is wrong in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runner.config.prompt_options import DIALECTS
from runner.config.prompts import parse_line
from runner.config.sections import SectionProblem, parse_sections
from runner.dataset.item_facts import item_facts
from runner.errors import InvalidConfig
from runner.families.framepack.sections import paddings, sections_for_seconds
from schemas.families.framepack import OneFrameInference
from schemas.sampling import Prompt
from tests.inprocess import prepared
from tests.support import Place, draw_clips, draw_pictures, family_changes, merged
from tests.test_video import RUNS, changes_of

Make = Callable[..., Place]


@pytest.fixture
def video_place(family_place: Make) -> Make:
    """Kind → a place with clips, pictures, control images and a start image."""

    def make(kind: str, **changes: Any) -> Place:
        name = "hunyuan_video" if kind == "hunyuan_video" else "framepack"
        place = family_place(name)
        draw_clips(place.folder / "clips", [30, 21])
        draw_pictures(place.folder / "controls", 10, seed=8)
        Image.open(place.folder / "pics" / "0.png").resize((64, 48)).save(place.folder / "start.png")
        place.base = family_changes(name)
        place.write(changes_of(kind, dataset={"held_out": None}, **changes))
        return place

    return make


def problems(place: Place, kind: str, **changes: Any) -> str:
    """What is wrong with a run.toml, as it is shown."""
    place.write(merged(changes_of(kind, dataset={"held_out": None}), changes))
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.file)
    return "\n".join(item.render() for item in caught.value.diagnostics if item.severity == "error")


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_the_same_letters_in_three_dialects() -> None:
    line = "a cat --w 640 --h 480 --f 25 --d 1 --s 20 --g 5.5 --l 2 --n ugly --fs 7"
    shared = {
        "prompt": "a cat",
        "width": 640,
        "height": 480,
        "seed": 1,
        "num_inference_steps": 20,
        "negative_prompt": "ugly",
        "flow_shift": 7.0,
    }
    assert parse_line(line, "musubi") == Prompt(**shared, frames=25, embedded_guidance=5.5, cfg_scale=2.0)
    line = line.replace("--g 5.5 --l 2", "--g 2")
    assert parse_line(line, "framepack") == Prompt(**shared, seconds=25.0, cfg_scale=2.0)
    assert parse_line("x --l 3", "framepack") == parse_line("x --g 3", "framepack")
    with pytest.raises(InvalidConfig):
        parse_line("x --g 3", "kohya")


def test_the_letters_of_framepack() -> None:
    line = "walk --i a.png --ei b.png --vs 3 --im m.png --ci c.png --ci d.png --cim e.png --of target_index=1,control_index=0;10,no_2x"
    assert parse_line(line, "framepack") == Prompt(
        prompt="walk",
        image="a.png",
        end_image="b.png",
        sections=3,
        image_mask="m.png",
        control_images=["c.png", "d.png"],
        control_masks=["e.png"],
        one_frame=OneFrameInference(target_index=1, control_index=[0, 10], no_2x=True),
    )
    assert parse_line("walk --of default", "framepack").one_frame == OneFrameInference()
    assert parse_line("I walk --d -1", "framepack") == Prompt(prompt="I walk", seed=-1), (
        "no option, and a seed that is drawn"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x --f long", "option `--f` (frames): must be an integer, not 'long'"),
        ("x --of twice=1", "option `--of` (one_frame): there is no 'twice=1'"),
        ("x --of target_index=a", "option `--of` (one_frame): 'target_index=a' must hold whole numbers"),
        ("x --vs 0", "option `--vs` (sections): must be at least 1"),
        ("x --i", "option `--i` (image): its value is missing"),
        ("x --i a --i b", "option `--i` stands twice"),
    ],
)
def test_wrong_options_are_named(line: str, message: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        parse_line(line, "musubi")
    assert message in caught.value.diagnostics[0].render()


def test_sections_of_a_text() -> None:
    said = parse_sections("0:first;;;1:second;;;-1:last;;;3-4:far")
    assert [said.of(index, 6) for index in range(6)] == ["first", "second", "first", "far", "far", "last"]
    assert parse_sections("a plain prompt: with a colon").of(2, 3) == "a plain prompt: with a colon"
    assert parse_sections("2:a;;;4:b").of(0, 6) == "a", "without one for 0 the smallest from the front"
    assert parse_sections("-1:a;;;-3:b").of(0, 6) == "b", "else the most negative"
    assert parse_sections("C:/a.png;;;1:D:/b.png").values == {0: "C:/a.png", 1: "D:/b.png"}, "a drive is no section"
    for text, message in (
        ("0:a;;;0:b", "given twice"),
        ("3-1:a", "ends before it begins"),
        ("0:;;;1:b", "says nothing"),
    ):
        with pytest.raises(SectionProblem, match=message):
            parse_sections(text)
    with pytest.raises(SectionProblem, match=r"names section 7 of a video of 3 sections \(0 to 2, or -1 to -3\)"):
        parse_sections("7:x").check(3)


def test_paddings_and_seconds() -> None:
    assert [paddings(count) for count in (1, 2, 4, 5, 8)] == [
        [0],
        [1, 0],
        [3, 2, 1, 0],
        [3, 2, 2, 1, 0],
        [3, 2, 2, 2, 2, 2, 1, 0],
    ]
    assert [sections_for_seconds(seconds, 9) for seconds in (0.1, 1, 5, 60)] == [1, 1, 4, 50], (
        "whatever the fps is shown"
    )


def test_what_is_left_open(video_place: Make) -> None:
    place = video_place(
        "hunyuan_video",
        sampling={
            "width": None,
            "height": None,
            "num_inference_steps": None,
            "prompts": [
                {"prompt": "a"},
                {"prompt": "b", "num_inference_steps": 50},
                {"prompt": "c", "num_inference_steps": 10, "seconds": 1.0},
                {"prompt": "d", "flow_shift": 3.0, "frames": 7, "width": 250},
            ],
        },
    )
    run = prepared(place.file)
    first, second, third, fourth = run.prompts
    assert (first.width, first.height, first.num_inference_steps, first.frames) == (256, 256, 20, 1)
    assert first.own is not None
    assert (first.own.guidance, first.cfg_scale, first.own.fps) == (6.0, 1.0, 24.0)
    assert [prompt.own.shift for prompt in run.prompts if prompt.own] == [14.5, 7.0, 17.0, 3.0]
    assert (second.frames, third.frames, fourth.frames, fourth.width) == (1, 21, 5, 240)
    assert run.notes == [
        "prompt 3: 24 frames are made as 21 (4n + 1)",
        "prompt 4: 250x256 is made as 240x256 (multiples of 16)",
        "prompt 4: 7 frames are made as 5 (4n + 1)",
    ]
    run = prepared(
        video_place(
            "i2v",
            sampling={
                "dialect": "framepack",
                "width": None,
                "height": None,
                "prompts": [{"prompt": "a", "image": "start.png"}, {"prompt": "b", "image": "start.png", "frames": 40}],
            },
        ).file
    )
    assert [(p.frames, p.width) for p in run.prompts] == [(4 * 2 * 19 + 1, 640), (41 - 8, 640)]
    assert run.prompts[0].own is not None
    assert (run.prompts[0].own.guidance, run.prompts[0].num_inference_steps, run.prompts[0].sampler) == (
        10.0,
        2,
        "unipc",
    )
    assert "prompt 2: 40 frames are made as 33 (4 whole sections)" in run.notes


# --- bad input --------------------------------------------------------------------------------------------------------

BAD: list[tuple[str, dict[str, Any], str]] = [
    (
        "i2v",
        {"model": {"latent_window_size": 6}},
        "clips/1.mp4 gives clips of 21 frames; a section of 6 latent frames needs 25",
    ),
    (
        "i2v",
        {"dataset": {"sources": [{"path": "pics"}]}},
        'error: FramePack with variant = "i2v" trains on videos, and this source holds pictures',
    ),
    (
        "one_frame",
        {"dataset": {"sources": [{"path": "pics"}]}},
        "error: one-frame training needs control images, and this source has none",
    ),
    (
        "one_frame",
        {
            "dataset": {
                "sources": [{"path": "pics", "control_path": "controls", "one_frame": {"clean_indices": [0, 3]}}]
            }
        },
        "pics/0.png has 1 control images, one_frame.clean_indices 2",
    ),
    (
        "hunyuan_video",
        {"dataset": {"sources": [{"path": "pics", "control_path": "controls"}]}},
        "error: family hunyuan_video cannot use `control_path`: it belongs to FramePack and FLUX.1",
    ),
    (
        "hunyuan_video",
        {"dataset": {"sources": [{"path": "clips", "kind": "video", "target_frames": [33]}]}},
        "clips/0.mp4 has 30 frames, fewer than target_frames 33",
    ),
    ("hunyuan_video", {"dataset": {"sources": [{"path": "pics", "kind": "video"}]}}, "error: no videos in"),
    (
        "i2v",
        {"sampling": {"prompts": [{"prompt": "a"}]}},
        "error: prompt 1: FramePack makes videos from a picture, and this prompt has none",
    ),
    ("i2v", {"sampling": {"prompts": [{"prompt": "a", "image": "no.png"}]}}, "error: prompt 1: there is no picture"),
    (
        "i2v",
        {"sampling": {"prompts": [{"prompt": "0:a;;;5:b", "image": "start.png", "sections": 3}]}},
        "error: prompt 1: `prompt`: '5' names section 5 of a video of 3 sections",
    ),
    (
        "i2v",
        {"sampling": {"prompts": [{"prompt": "a", "image": "0:start.png;;;-4:start.png", "sections": 3}]}},
        "error: prompt 1: `image`: '-4' names section -4",
    ),
    (
        "i2v",
        {"sampling": {"prompts": [{"prompt": "a", "image": "start.png", "sections": 3, "latent_paddings": [0]}]}},
        "error: prompt 1: there are 1 latent_paddings for 3 sections",
    ),
    (
        "i2v",
        {"sampling": {"prompts": [{"prompt": "a", "image": "start.png", "control_images": ["start.png"]}]}},
        "error: prompt 1: family framepack cannot use `control_images`: it belongs to model.variant",
    ),
    (
        "i2v",
        {"sampling": {"prompts": [{"prompt": "a", "image": "start.png", "sections": 3, "seconds": 2.0}]}},
        "`seconds` and `sections`; they say the same thing",
    ),
    (
        "one_frame",
        {"sampling": {"prompts": [{"prompt": "a"}]}},
        "error: prompt 1: one-frame inference needs control images",
    ),
    (
        "one_frame",
        {"sampling": {"prompts": [{"prompt": "a", "control_images": ["start.png"], "frames": 9}]}},
        "cannot use `frames`: one-frame inference makes one picture",
    ),
    (
        "hunyuan_video",
        {"sampling": {"prompts": [{"prompt": "a", "image": "start.png"}]}},
        "error: prompt 1: family hunyuan_video cannot use `image`: it belongs to FramePack",
    ),
    (
        "hunyuan_video",
        {"training": {"memory": {"blocks_to_swap": 3}}},
        "error: the denoiser has 4 blocks; some must stay",
    ),
    ("hunyuan_video", {"model": {"tokenizer_1": "model/tokenizer_2"}}, "error: the tokenizer in"),
    ("hunyuan_video", {"model": {"tokenizer_1": "nowhere"}}, "error: there is no file or folder"),
    (
        "hunyuan_video",
        {"dataset": {"resolution": [30, 32], "buckets": {"enabled": False}}},
        "30x32 is no multiple of 16, which the model needs",
    ),
    (
        "hunyuan_video",
        {"model": {"variant": "f1"}},
        "family hunyuan_video cannot use `model.variant`: it belongs to FramePack",
    ),
    (
        "hunyuan_video",
        {"training": {"components": {"text_encoder_1": True}}},
        "family hunyuan_video cannot use `training.components.text_encoder_1`",
    ),
    (
        "hunyuan_video",
        {"dataset": {"sources": [{"path": "clips", "kind": "video", "frame_extraction": "tail"}]}},
        "frame_extraction",
    ),
]


@pytest.mark.parametrize(("kind", "changes", "message"), BAD, ids=[message[:50] for _, _, message in BAD])
def test_bad_input_is_named_when_planning(video_place: Make, kind: str, changes: dict[str, Any], message: str) -> None:
    text = problems(video_place(kind), kind, **changes)
    assert message in text
    assert "run.toml:" in text, "it is shown where it stands"


def test_a_whole_message(video_place: Make) -> None:
    place = video_place("i2v")
    text = problems(place, "i2v", sampling={"prompts": [{"prompt": "a"}]})
    line = place.file.read_text().splitlines().index("[[sampling.prompts]]") + 1
    assert text == (
        "error: prompt 1: FramePack makes videos from a picture, and this prompt has none\n"
        f"{' ' * len(str(line))}┌ run.toml:{line}:1\n"
        f"{line}│ [[sampling.prompts]]\n"
        f"{' ' * len(str(line))}│ ^^^^^^^^^^^^^^^^^^^^\n"
        'hint: set image = "start.png"'
    )


def test_f1_ignores_an_end_image_and_says_so(video_place: Make) -> None:
    place = video_place("f1", sampling={"prompts": [{"prompt": "a", "image": "start.png", "end_image": "start.png"}]})
    run = prepared(place.file)
    assert [item.message for item in run.warnings] == [
        'prompt 1: `end_image` is ignored with variant = "f1", which goes forward'
    ]
    assert run.prompts[0].own is not None
    assert run.prompts[0].own.end_image is None


def test_a_still_family_refuses_videos(place: Place) -> None:
    draw_clips(place.folder / "clips", [9])
    place.write({"dataset": {"held_out": None, "sources": [{"path": "clips", "kind": "video"}]}})
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.file)
    assert "Stable Diffusion 1.5 trains on pictures, not on videos" in caught.value.diagnostics[0].render()


@pytest.mark.parametrize("choice", ["error", "skip"])
def test_bad_clips_stop_or_are_left_out(video_place: Make, choice: str) -> None:
    place = video_place("hunyuan_video")
    content = (place.folder / "clips" / "0.mp4").read_bytes()
    (place.folder / "clips" / "broken.mp4").write_bytes(content[: len(content) // 2])
    (place.folder / "clips" / "broken.txt").write_text("x")
    (place.folder / "clips" / "empty.mp4").write_bytes(b"")
    (place.folder / "clips" / "empty.txt").write_text("x")
    changes = {
        "dataset": {"on_bad_item": choice, "sources": [{"path": "clips", "kind": "video", "target_frames": [5, 25]}]}
    }
    if choice == "error":
        text = problems(place, "hunyuan_video", **changes)
        assert "2 items cannot be used" in text
        assert "clips/empty.mp4 is empty" in text
        return
    place.write(merged(changes_of("hunyuan_video", dataset={"held_out": None}), changes))
    run = prepared(place.file)
    assert {item.name for item in run.collection.bad} == {"clips/broken.mp4", "clips/empty.mp4"}
    said = "1 video is too short for target_frames 25 (clips/1.mp4 has 21 frames); shorter windows are used"
    assert run.dataset_notes.render() == [said]
    out = place.run("plan").ok().out
    assert "left out     clips/broken.mp4 is cut off: its container says" in out
    assert f"  dataset\n    {said}\n" in out


# --- musubi-tuner's dataset files -------------------------------------------------------------------------------------


def test_a_musubi_file_is_taken_as_it_is(video_place: Make) -> None:
    place = video_place("hunyuan_video")
    (place.folder / "dataset.toml").write_text(
        '[general]\nresolution = [48, 32]\ncaption_extension = ".txt"\nbatch_size = 2\nenable_bucket = true\n'
        "bucket_no_upscale = false\n\n"
        '[[datasets]]\nvideo_directory = "clips"\ncache_directory = "cache"\ntarget_frames = [1, 9]\n'
        'frame_extraction = "uniform"\nframe_sample = 2\nsource_fps = 30\nnum_repeats = 2\n\n'
        '[[datasets]]\nimage_directory = "pics"\nresolution = 32\n'
    )
    ours = {
        "resolution": [48, 32],
        "batch_size": 2,
        "sources": [
            {
                "path": "clips",
                "kind": "video",
                "target_frames": [1, 9],
                "frame_extraction": "uniform",
                "frame_sample": 2,
                "source_fps": 30.0,
                "repeats": 2,
            },
            {"path": "pics", "resolution": 32},
        ],
    }
    place.base = {"model": {"family": "hunyuan_video"}, "dataset": {"batch_size": None, "resolution": None}}
    place.write(changes_of("hunyuan_video", dataset={"sources": None, "config_file": "dataset.toml", "held_out": None}))
    theirs = prepared(place.file).collection
    place.write(changes_of("hunyuan_video", dataset={**ours, "held_out": None}))
    assert [item_facts(item) for item in theirs.items] == [
        item_facts(item) for item in prepared(place.file).collection.items
    ]
    assert {item.clip.source_fps for item in theirs.items if item.clip} == {30}


def test_a_musubi_file_for_one_frame(video_place: Make) -> None:
    place = video_place("one_frame")
    (place.folder / "dataset.toml").write_text(
        '[general]\nresolution = [32, 32]\ncaption_extension = ".txt"\nbatch_size = 1\nenable_bucket = true\n'
        '[[datasets]]\nimage_directory = "pics"\ncontrol_directory = "controls"\nfp_latent_window_size = 2\n'
        "fp_1f_clean_indices = [0]\nfp_1f_target_index = 1\nfp_1f_no_post = true\n"
    )
    place.base = {
        "model": {"family": "framepack", "variant": "one_frame", "latent_window_size": 2},
        "dataset": {"batch_size": None, "resolution": None},
    }
    place.write(changes_of("one_frame", dataset={"sources": None, "config_file": "dataset.toml", "held_out": None}))
    items = prepared(place.file).collection.items
    assert {tuple(item.own.one_frame) for item in items if item.own.one_frame} == {(1, (0,), True, False, False, 2)}
    (place.folder / "dataset.toml").write_text(
        (place.folder / "dataset.toml").read_text().replace("size = 2", "size = 9")
    )
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.file)
    assert "`fp_latent_window_size` is 9, model.latent_window_size is 2" in caught.value.diagnostics[0].render()


def test_numbered_control_images(video_place: Make) -> None:
    place = video_place("one_frame")
    for file in list((place.folder / "controls").glob("*.png")):
        (place.folder / "controls" / f"{file.stem}_1.png").write_bytes(file.read_bytes())
        file.rename(place.folder / "controls" / f"{file.stem}_0.png")
    source = {"path": "pics", "control_path": "controls", "one_frame": {"clean_indices": [0, 2]}}
    place.write(changes_of("one_frame", dataset={"sources": [source], "held_out": None}))
    item = next(item for item in prepared(place.file).collection.items if item.name == "pics/3.png")
    assert [Path(control.path or "").name for control in item.pictures] == ["3_0.png", "3_1.png"]
    lines = [{"image_path": "3.png", "caption": "x", "control_path_0": "0.png", "control_path_1": "1.png"}]
    (place.folder / "pics" / "list.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    source = {"path": "pics/list.jsonl", "one_frame": {"clean_indices": [0, 2]}}
    place.write(changes_of("one_frame", dataset={"sources": [source], "held_out": None}))
    (item,) = prepared(place.file).collection.items
    assert [Path(control.path or "").name for control in item.pictures] == ["0.png", "1.png"]


def test_every_dialect_names_keys_of_prompts() -> None:
    assert set(DIALECTS) == {"kohya", "musubi", "framepack"}
    for letters in DIALECTS.values():
        assert set(letters.values()) <= set(Prompt.model_fields)
    assert RUNS
