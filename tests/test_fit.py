"""`plan --fit` on stand-ins of full-size files: every proposal is valid, and the plan with it says what was shown."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli
import tomlkit

from runner.config.load import changed, load
from runner.plan.diff import Plan, make_plan
from runner.plan.estimate import figures, memory_question, trained_numbers
from runner.plan.fit import LIBRARIES, Fit, fit, parse_memory
from runner.plan.prepare import prepare
from runner.plan.remedies import remedies
from runner.plan.render import render_fit, render_plan, size_text
from runner.store.store import find_store
from tests.stand_in import write_flux, write_stand_in, write_video
from tests.support import Place, draw_clip, draw_pictures, merged

GB = 10**9
FAMILIES = ("sd15", "sdxl", "sd3", "hunyuan_video", "framepack", "flux1", "chroma")
LIMITS = (8, 12, 16, 24)
Planned = Callable[..., Plan]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins of all full-size files, pictures and clips."""
    made = tmp_path_factory.mktemp("fit")
    for name, without in (("sd15", ()), ("sdxl", ()), ("sd3", ("t5xxl",))):
        write_stand_in(made / f"{name}.safetensors", name, without)
    for name in ("hunyuan_video", "framepack"):
        write_video(made, name)
    write_flux(made)
    (made / "flux1-dev.safetensors").rename(made / "flux1.safetensors")
    (made / "Chroma1-HD.safetensors").rename(made / "chroma.safetensors")
    (made / "FramePackI2V_HY_bf16.safetensors").rename(made / "framepack.safetensors")
    (made / "hunyuan.safetensors").rename(made / "hunyuan_video.safetensors")
    draw_pictures(made / "images", 6)
    for index, frames in enumerate((80, 46)):
        draw_clip(made / "clips" / f"{index}.mp4", frames, (64, 64), index)
        (made / "clips" / f"{index}.txt").write_text("a thing moves")
    return made


def document(family: str, method: str) -> dict[str, Any]:
    """A run.toml in `folder`: at the family's own size, in batches of four."""
    source: dict[str, Any] = {"path": "images"}
    model: dict[str, Any] = {"family": family, "checkpoint": f"{family}.safetensors"}
    if family in ("hunyuan_video", "framepack"):
        source = {"path": "clips", "kind": "video", "frame_extraction": "full"}
        model |= {
            "vae": "hunyuan-video-vae.safetensors",
            "text_encoder_1": "llava_llama3_fp16.safetensors",
            "tokenizer_1": "llama-tokenizer",
            "text_encoder_2": "clip_l.safetensors",
        }
    if family == "framepack":
        model["image_encoder"] = "sigclip_vision_patch14_384.safetensors"
    if family in ("flux1", "chroma"):
        number = 2 if family == "flux1" else 1
        model |= {
            "vae": "ae.safetensors",
            f"text_encoder_{number}": "t5xxl_fp16.safetensors",
            f"tokenizer_{number}": "t5-tokenizer",
        }
        model |= {"text_encoder_1": "clip_l.safetensors"} if family == "flux1" else {}
    found: dict[str, Any] = {
        "schema_version": 1,
        "run": {"name": "t"},
        "model": model,
        "dataset": {"batch_size": 4, "sources": [source]},
        "training": {"max_train_steps": 10},
        "sampling": {"prompts": [{"prompt": "a thing"}], "every_n_steps": 5},
    }
    if family == "framepack":
        found["sampling"] = {}  # its prompts name pictures
    if method == "lora":
        found["network"] = {"rank": 16}
    return found


@pytest.fixture
def planned(folder: Path) -> Planned:
    """A document, with changes, as a plan."""

    def make(content: dict[str, Any], **changes: Any) -> Plan:
        file = folder / "run.toml"
        file.write_text(tomlkit.dumps(merged(content, changes)), encoding="utf-8")
        return make_plan(prepare(load(file), find_store(folder)))

    return make


def written(found: Fit) -> dict[str, Any]:
    """The lines that `--fit` prints, read as TOML."""
    lines = render_fit(found).partition("  In run.toml:\n")[2]
    return tomli.loads(textwrap.dedent(lines))


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_proposal_is_a_valid_run_that_plans_to_what_was_shown(planned: Planned, family: str, method: str) -> None:
    content = document(family, method)
    plan = planned(content)
    peaks = []
    for limit in LIMITS:
        found = fit(plan, limit * GB)
        again = planned(merged(content, written(found)))  # the checks raise where a line may not stand there
        shown = figures(again, None, "cuda")
        assert shown.peak == found.after, (family, method, limit)
        assert f"{size_text(found.after)} predicted at the peak ({found.phase}) on a GPU" in render_plan(again, shown)
        assert [peak for _, peak in found.steps][-1:] in ([], [found.after])
        assert found.fits == (found.after <= limit * GB)
        assert found.fits or limit < 24 or method == "full" or family == "hunyuan_video"
        if found.fits:
            second = fit(again, limit * GB)
            assert (second.before, second.steps) == (found.after, ())
        peaks.append(found.after)
    assert peaks == sorted(peaks), "more memory is used, not less"


@pytest.mark.parametrize(("family", "method"), [("sdxl", "lora"), ("sd3", "full"), ("framepack", "lora")])
def test_a_remedy_changes_what_it_says(planned: Planned, family: str, method: str) -> None:
    """The search believes what the plan with that setting alone then says."""
    plan = planned(document(family, method), run={"device": "cuda"})
    question = memory_question(plan, trained_numbers(plan.prepared)[0], "cuda")
    predict, names = plan.prepared.spec.memory, set()
    for group in remedies(plan, question):
        for remedy in group[-1:]:
            loaded = changed(plan.prepared.source, remedy.settings)
            if loaded.errors:
                continue
            alone = make_plan(prepare(loaded, plan.prepared.store))
            asked = memory_question(alone, trained_numbers(alone.prepared)[0], "cuda")
            assert predict(asked).phases == predict(remedy.change(question)).phases, remedy.settings
            names.add(remedy.group)
    video = family == "framepack"
    assert {"activations", "batch", "latents", "tiles", "captions"} <= names
    assert ("strips" in names, "text" in names) == (video, video), "what the family's spec refuses is not proposed"
    assert ("swap" in names, "fused" in names) == (method == "lora", method == "full")


def test_blocks_to_swap_is_the_users_number(planned: Planned) -> None:
    """36 is the most that FramePack's key takes; 55 of its 60 blocks then wait."""
    found = fit(planned(document("framepack", "lora")), 2 * GB)
    assert not found.fits
    assert found.settings["training.memory.blocks_to_swap"] == 36
    assert "55 of 60 blocks wait on the host" in render_fit(found)


def test_a_file_with_checkpointing_can_still_move_activations(planned: Planned) -> None:
    memory = {"gradient_checkpointing": True, "blocks_to_swap": 36}
    content = merged(
        document("framepack", "lora"),
        {"model": {"quantization": "nf4"}, "training": {"memory": memory}, "dataset": {"batch_size": 1}},
    )
    plan = planned(content)
    found = fit(plan, 12 * GB)
    assert found.fits
    assert found.settings["training.memory.activation_offload"] is True
    assert "training.memory.gradient_checkpointing" not in found.settings


def test_weights_that_are_packed_can_be_packed_more(planned: Planned) -> None:
    """fp8 in the file leaves 4 bits to propose, as no checkpointing leaves moving activations."""
    for kind in ("fp8", "fp8_scaled", "int8"):
        model = {"quantization": kind, "text_encoder_quantization": kind}
        plan = planned(document("framepack", "lora"), model=model)
        least = fit(plan, 2 * GB)
        assert (least.settings["model.quantization"], least.settings["model.text_encoder_quantization"]) == (
            "nf4",
            "nf4",
        )
    assert not any("quantization" in key for key in fit(plan, 60 * GB).settings)


def test_what_a_file_says_itself_is_not_proposed_against(planned: Planned) -> None:
    """fused_backward allows no accumulation, an eager optimizer no tensor by tensor: pairs that may not stand together."""
    whole = {"memory": {"fused_backward": True}, "max_grad_norm": 0.0}
    plan = planned(document("sdxl", "full"), training=whole)
    for limit in (2, 8, 12):
        assert "dataset.batch_size" not in fit(plan, limit * GB).settings
    free = {"optimizer": {"type": "schedule_free_adamw"}}
    least = fit(planned(document("sdxl", "full"), training=free), 2 * GB)
    assert not least.fits
    assert not any("offload" in key and "optimizer" in key for key in least.settings)


def test_swapping_in_the_file_counts_where_the_gpu_is_asked_about(planned: Planned) -> None:
    """run.device is the CPU here; the question of --fit is a GPU's."""
    content = document("sdxl", "lora")
    swapped = {"memory": {"blocks_to_swap": 80}}
    plain, less = (fit(planned(content, training=changes), 40 * GB).before for changes in ({}, swapped))
    assert less < plain - 2 * GB
    both = planned(content, run={"device": "cuda"}, training=swapped)
    assert figures(both, None).peak == less


def test_samples_are_decoded_in_their_own_tiles(planned: Planned) -> None:
    content = document("sdxl", "lora")
    content["sampling"] |= {"width": 2048, "height": 2048}

    def sample(**changes: Any) -> int:
        return figures(planned(content, run={"device": "cuda"}, **changes), None).memory.phases["sample"]

    whole = sample()
    tiled = sample(sampling={"vae_tile_size": 512})
    assert tiled < whole - 5 * GB
    assert sample(caching={"vae_tile_size": 512}) == tiled
    found = fit(planned(content), 12 * GB)
    assert found.settings["sampling.vae_tile_size"] == 512


def test_a_tile_is_one_of_each_picture_of_the_batch(planned: Planned) -> None:
    def encoding(**caching: Any) -> int:
        plan = planned(document("sdxl", "lora"), run={"device": "cuda"}, caching={"vae_tile_size": 512, **caching})
        return figures(plan, None).memory.phases["cache.latents"]

    assert encoding(latent_batch_size=4) > 2 * encoding(latent_batch_size=1)


def test_sizes_of_memory() -> None:
    accepted = {
        "12": 12 * GB,
        "12GB": 12 * GB,
        "11.5 GiB": int(11.5 * 2**30),
        "8000MB": 8 * GB,
        "8g": 8 * GB,
        " 24 gb ": 24 * GB,
        "1TB": 1000 * GB,
    }
    assert {text: parse_memory(text) for text in accepted} == accepted
    for text in (
        "",
        "x",
        "12 parsecs",
        "12MB",
        "0",
        "-12",
        "12B",
        "999MB",
        "1.1TB",
        "8192",
        "1e3",
        "12,5",
        "٣GB",
        "nan",
        "9" * 5000,
    ):
        assert parse_memory(text) is None, text


def test_a_size_that_is_none(place: Place) -> None:
    for verb in (
        ["plan", "--fit", "12 parsecs"],
        ["new", "--model", "m", "--images", "i", "--memory", "12 parsecs", "--out", "new.toml"],
    ):
        result = place.run(*verb)
        assert result.code == 64
        option = "--fit" if verb[0] == "plan" else "--memory"
        assert result.err.strip() == (
            f"error: {option} 12 parsecs: write it as 12GB\nhint: from 1GB to 1TB, in GB, GiB or MB; 12 is 12GB"
        )
    assert LIBRARIES["cuda"] < GB, "the least that may be typed leaves room for something"


def test_what_saves_most_is_shown_first(planned: Planned) -> None:
    """Each line's figure is the peak with it and all above it: it falls, whatever phase is the highest."""
    found = fit(planned(document("framepack", "lora")), 12 * GB)
    peaks = [found.before, *(peak for _, peak in found.steps)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[1] < found.before
    assert len(found.steps) > 3
