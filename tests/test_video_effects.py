"""Every key of video models does what it declares, and shows: in the trained weights, or in what is sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from runner.config.schema import all_keys
from runner.core.events import Events
from runner.families.registry import family
from runner.inputs.sample import SampleInputs
from runner.inputs.train import TrainInputs
from runner.plan.compile import compile_graph
from runner.plan.prepare import Prepared
from runner.stages.context import Context
from runner.stages.modules import build
from runner.stages.pictures import decode, encode_prompts, make_latents
from tests.inprocess import prepared, trained_bytes
from tests.support import Place, draw_clips, draw_pictures, merged

SAMPLES = {"num_inference_steps": 3, "width": 32, "height": 32}
BASES: dict[str, dict[str, Any]] = {
    "hv": {
        "model": {"family": "hunyuan_video", "checkpoint": "hunyuan_video"},
        "dataset": {
            "resolution": [32, 32],
            "held_out": None,
            "sources": [{"path": "clips", "kind": "video", "target_frames": [5, 9]}],
        },
        "sampling": {**SAMPLES, "prompts": [{"prompt": "a thing"}]},
    },
    "i2v": {
        "model": {"family": "framepack", "checkpoint": "framepack", "latent_window_size": 2},
        "dataset": {
            "resolution": [32, 32],
            "held_out": None,
            "sources": [{"path": "clips", "kind": "video", "frame_extraction": "full"}],
        },
        "sampling": {**SAMPLES, "prompts": [{"prompt": "a thing", "image": "start.png", "sections": 2}]},
    },
    "one": {
        "model": {"family": "framepack", "checkpoint": "framepack", "variant": "one_frame", "latent_window_size": 2},
        "dataset": {
            "resolution": [32, 32],
            "held_out": None,
            "sources": [{"path": "pics", "control_path": "controls"}],
        },
        "sampling": {**SAMPLES, "prompts": [{"prompt": "a thing", "control_images": ["start.png"]}]},
    },
}


def source(**changes: Any) -> dict[str, Any]:
    return {"dataset": {"sources": [{"path": "clips", "kind": "video", "target_frames": [5, 9], **changes}]}}


def full(**changes: Any) -> dict[str, Any]:
    return {"dataset": {"sources": [{"path": "clips", "kind": "video", "frame_extraction": "full", **changes}]}}


def frame(**changes: Any) -> dict[str, Any]:
    return {"dataset": {"sources": [{"path": "pics", "control_path": "controls", "one_frame": changes}]}}


Change = dict[str, Any]
CASES: list[tuple[str, str, Change, Change]] = [
    ("model.variant", "i2v", {}, {"model": {"variant": "f1"}}),
    ("model.latent_window_size", "i2v", {}, {"model": {"latent_window_size": 3}}),
    ("model.split_attention", "i2v", {}, {"model": {"split_attention": True}}),
    ("model.image_encoder", "i2v", {}, {"model": {"image_encoder": "framepack/image_encoder"}}),
    ("caching.vae_chunk_size", "i2v", {}, {"caching": {"vae_chunk_size": 8}}),
    ("training.embedded_guidance", "i2v", {}, {"training": {"embedded_guidance": 6.0}}),
    ("training.raw_embedded_guidance", "hv", {}, {"training": {"raw_embedded_guidance": True}}),
    ("dataset.sources.control_path", "one", {}, {"dataset": {"sources": [{"path": "pics", "control_path": "others"}]}}),
    ("dataset.sources.target_frames", "hv", source(), source(target_frames=[5, 13])),
    ("dataset.sources.frame_extraction", "hv", source(), source(frame_extraction="chunk")),
    (
        "dataset.sources.frame_stride",
        "hv",
        source(frame_extraction="slide", frame_stride=4),
        source(frame_extraction="slide", frame_stride=5),
    ),
    (
        "dataset.sources.frame_sample",
        "hv",
        source(frame_extraction="uniform", frame_sample=2),
        source(frame_extraction="uniform", frame_sample=3),
    ),
    ("dataset.sources.max_frames", "hv", full(), full(max_frames=13)),
    ("dataset.sources.source_fps", "hv", source(), source(source_fps=48.0)),
    ("dataset.sources.one_frame.target_index", "one", {}, frame(target_index=1)),
    ("dataset.sources.one_frame.clean_indices", "one", {}, frame(clean_indices=[3])),
    ("dataset.sources.one_frame.no_post", "one", {}, frame(no_post=True)),
    ("dataset.sources.one_frame.no_2x", "one", {}, frame(no_2x=True)),
    ("dataset.sources.one_frame.no_4x", "one", {}, frame(no_4x=True)),
    ("sampling.vae_chunk_size", "hv", {}, {"sampling": {"vae_chunk_size": 8}}),
    ("sampling.blocks_to_swap", "hv", {}, {"sampling": {"blocks_to_swap": 0}}),
]
PROMPTS: list[tuple[str, str, Change, Any]] = [
    ("frames", "hv", {}, 5),
    ("seconds", "hv", {}, 0.4),
    ("sections", "i2v", {}, 3),
    ("fps", "i2v", {}, 12.0),
    ("embedded_guidance", "hv", {}, 1.0),
    ("guidance_rescale", "i2v", {"cfg_scale": 2.0}, 0.7),
    ("flow_shift", "hv", {}, 3.0),
    ("image", "i2v", {}, "other.png"),
    ("end_image", "i2v", {}, "other.png"),
    ("image_mask", "one", {}, "mask.png"),
    ("control_images", "one", {}, ["other.png"]),
    ("control_masks", "one", {}, ["mask.png"]),
    ("one_frame.target_index", "one", {}, 1),
    ("one_frame.control_index", "one", {}, [5]),
    ("one_frame.no_post", "one", {}, True),
    ("one_frame.no_2x", "one", {}, True),
    ("one_frame.no_4x", "one", {}, True),
    ("latent_paddings", "i2v", {}, [0, 0]),
    ("custom_system_prompt", "hv", {}, "Say what you see:"),
    ("rope_scaling_factor", "one", {"rope_scaling_timestep_threshold": 10.0}, 0.7),
    ("rope_scaling_timestep_threshold", "one", {}, 10.0),
    ("bulk_decode", "i2v", {}, True),
]
VIDEO_KEYS = {name for name, *_ in CASES} | {
    f"sampling.{place}{name}" for name, *_ in PROMPTS for place in ("", "prompts.")
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A place with both models, clips, pictures and their control images."""
    folder = tmp_path_factory.mktemp("video_effects")
    for name in ("hunyuan_video", "framepack"):
        family(name).tiny(folder / name)
    draw_clips(folder / "clips", [25, 21])
    for number, name in enumerate(("pics", "controls", "others")):
        draw_pictures(folder / name, 2, seed=number)
    for number, name in enumerate(("start", "other")):
        Image.open(folder / "pics" / f"{number}.png").resize((64, 48)).save(folder / f"{name}.png")
    Image.linear_gradient("L").resize((64, 48)).save(folder / "mask.png")
    place = Place(folder)
    place.base = {"network": {"rank": 2}, "training": {"max_train_steps": 3, "checkpoints": {"every_n_steps": 3}}}
    return place


def with_prompt(base: str, **changes: Any) -> Change:
    """The first prompt of a base with changes; dotted names are tables."""
    prompt = dict(BASES[base]["sampling"]["prompts"][0])
    for name, value in changes.items():
        if name in ("frames", "seconds", "sections"):
            prompt = {key: old for key, old in prompt.items() if key not in ("frames", "seconds", "sections")}
        table, _, last = name.partition(".")
        prompt[table] = {last: value} if last else value
    return merged(BASES[base], {"sampling": {"prompts": [prompt]}})


def facts(place: Place, changes: Change) -> tuple[dict[str, str], dict[str, Any]]:
    graph = compile_graph(prepared(place.write(changes)))
    return {name: node.fingerprint for name, node in graph.nodes.items()}, graph.runtime.bits()


def check(place: Place, dotted: str, before: Change, after: Change) -> None:
    """The declared effect, on fingerprints and bits."""
    declared = all_keys()[dotted]
    (old, old_bits), (new, new_bits) = facts(place, before), facts(place, after)
    changed = {name for name in old if old[name] != new[name]}
    if declared.effect == "trajectory":
        assert changed & set(declared.stages), f"declares {declared.stages}, changed {changed}"
        assert old_bits == new_bits
    elif declared.effect == "bits":
        assert not changed
        assert old_bits != new_bits


@pytest.mark.parametrize(("dotted", "base", "before", "after"), CASES, ids=[case[0] for case in CASES])
def test_declared_effect(ground: Place, dotted: str, base: str, before: Change, after: Change) -> None:
    check(ground, dotted, merged(BASES[base], before), merged(BASES[base], after))


SHOWN = [case for case in CASES if not case[0].startswith(("sampling", "model.image_encoder"))]


@pytest.mark.parametrize(("dotted", "base", "before", "after"), SHOWN, ids=[case[0] for case in SHOWN])
def test_training_shows_it(ground: Place, dotted: str, base: str, before: Change, after: Change) -> None:
    from safetensors.torch import load

    without = {"sampling": {"prompts": []}}
    one, two = (
        load(trained_bytes(ground.write(merged(merged(BASES[base], change), without)))) for change in (before, after)
    )
    distance = max(float((one[name] - two[name]).abs().max()) for name in one)
    if all_keys()[dotted].effect == "trajectory" or dotted.endswith("control_path"):  # a path whose content counts
        assert distance > 0, f"{dotted} changed nothing"
    else:
        assert distance < 1e-4


@pytest.mark.parametrize(("name", "base", "beside", "value"), PROMPTS, ids=[case[0] for case in PROMPTS])
def test_samples_show_it(ground: Place, name: str, base: str, beside: Change, value: Any) -> None:
    before, after = with_prompt(base, **beside), with_prompt(base, **beside, **{name: value})
    check(ground, f"sampling.prompts.{name}", before, after)
    own, table = prepared(ground.write(after)), with_prompt(base, **beside)
    if name not in ("sections", "frames", "seconds"):  # for all prompts at once: the same sample
        head, _, last = name.partition(".")
        table = merged(table, {"sampling": {head: {last: value} if last else value}})
        if name in table["sampling"]["prompts"][0]:
            table["sampling"]["prompts"][0].pop(name)
        assert prepared(ground.write(table)).prompts[0].facts() == own.prompts[0].facts()
    if name == "fps":  # the file says it, not the pixels
        return
    first, second = made(prepared(ground.write(before))), made(own)
    assert first.shape != second.shape or not torch.equal(first, second), f"{name} changed nothing"


def made(run: Prepared) -> Tensor:
    """Pixels of the first prompt by the base model."""
    graph, bundle = compile_graph(run), family(run.spec.name)
    context = Context(
        family=bundle,
        store=run.store,
        runtime=graph.runtime,
        numerics=graph.of(TrainInputs).numerics,
        device=torch.device("cpu"),
        events=Events(None),
    )
    prompts = list(run.prompts)
    encoded = encode_prompts(context, prompts, False)
    trained = build(context, graph.of(TrainInputs), None)
    latents = make_latents(context, trained.modules, prompts[0], encoded)
    vae = context.load("vae")
    bundle.tile(vae, graph.of(SampleInputs).tile_size, graph.runtime.sample_chunk)
    return decode(context, vae, latents, prompts[0])


def test_strips_decode_alike(ground: Path) -> None:
    """vae_chunk_size is exact: up to the order of sums."""
    place: Any = ground
    plain = made(prepared(place.write(BASES["hv"])))
    strips = made(prepared(place.write(merged(BASES["hv"], {"sampling": {"vae_chunk_size": 8}}))))
    assert not torch.equal(plain, torch.zeros_like(plain))
    torch.testing.assert_close(strips, plain, rtol=1e-5, atol=1e-5)
