"""Every key of the schema does what it declares: flipping it changes the fingerprints (trajectory), only the recorded
bits (bits), or neither (none); and for keys of training, the trained weights themselves change, or do not."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from runner.config.schema import leaf_keys
from runner.families.registry import family
from runner.networks.shapes import adapter_shapes
from runner.plan.compile import compile_graph
from schemas.dataset import Media
from schemas.walk import Key
from tests.inprocess import prepared, trained_bytes
from tests.support import Place, draw_pictures, merged, new_place
from tests.test_video_effects import VIDEO_KEYS
from tools.draw_shapes import drawn_at_random

# A configuration in which every key can be flipped alone.
BASE: dict[str, Any] = {
    "network": {"rank": 4, "conv_rank": 2},
    "dataset": {"held_out": None, "sources": [{"path": "pics"}, {"path": "more", "regularization": True}]},
    "training": {"ema": {}, "optimizer": {}, "scheduler": {}, "loss": {}, "components": {"text_encoder_1": True}},
    "sampling": {"prompt_file": "prompts.txt"},
    "selection": {"publish": [{"directory": "published"}]},
}
FLIPS: dict[str, Any] = {
    "run.name": "other",
    "run.output_dir": "elsewhere",
    "run.device": "cpu",
    "model.checkpoint": "copy",
    "model.vae": "copy/vae",
    "model.text_encoder_1": "copy",
    "model.tokenizer_1": "copy/tokenizer",
    "model.revision": "main",
    "model.dtype": "bf16",
    "model.prediction_type": "v_prediction",
    "model.clip_skip": 2,
    "network.alpha": 2.0,
    "network.conv_alpha": 1.0,
    "network.targets": "attention",
    "network.rank_pattern": {"attn2": 2},
    "model.text_encoder_2": "sdxl_copy",
    "model.text_encoder_3": "sd3_copy",
    "model.tokenizer_2": "sdxl_copy/tokenizer_2",
    "model.tokenizer_3": "sd3_copy/tokenizer_3",
    "model.max_token_length": 150,
    "model.family": "sdxl",
    "network.alpha_pattern": {"attn2": 2.0},
    "network.init_from": None,
    "network.base_weights": ["lora.safetensors:0.5"],
    "network.lora_plus_ratio": 16.0,
    "network.scale_weight_norms": 0.001,
    "network.decompose_factor": 4,
    "training.optimizer.type": "lion",
    "training.optimizer.weight_decay": 0.5,
    "training.optimizer.eps": 1e-2,
    "training.timesteps.sampling": "logit_normal",
    "training.timesteps.shift": 3.0,
    "training.components.text_encoder_2": True,
    "training.components.text_encoder_3": True,
    "training.loss.v_pred_like_loss": 0.5,
    "network.dropout": 0.2,
    "network.conv_rank": 3,
    "dataset.resolution": 16,
    "dataset.batch_size": 4,
    "training.max_train_steps": 8,
    "training.timesteps.max": 500,
    "training.checkpoints.every_n_steps": 3,
    "dataset.caption_extension": ".caption",
    "dataset.caption_separator": " ",
    "dataset.keep_tokens_separator": "|||",
    "dataset.secondary_separator": ";;;",
    "dataset.caption_prefix": "p",
    "dataset.caption_suffix": "s",
    "dataset.sources.path": "copied_pics",
    "dataset.sources.repeats": 3,
    "dataset.sources.class_tokens": "thing",
    "dataset.buckets.min_size": 12,
    "dataset.buckets.max_size": 40,
    "dataset.buckets.step": 8,
    "dataset.held_out.fraction": 0.3,
    "dataset.held_out.resolution": 16,
    "dataset.held_out.caption_extension": ".caption",
    "dataset.held_out.path": "copied_apart",
    "dataset.held_out.count": 3,
    "dataset.crop_style": "corner",
    "dataset.crop_aspect": "square",
    "dataset.face_crop_aug_range": [1.0, 2.0],
    "dataset.sources.mask_path": "masks",
    "training.loss.masked": False,
    "training.loss.zero_terminal_snr": True,
    "dataset.config_file": "dataset.toml",
    "caching.vae_tile_size": 64,
    "sampling.vae_tile_size": 64,
    "training.memory.blocks_to_swap": 1,
    "caching.latents": "memory",
    "caching.text": "memory",
    "caching.dtype": "bf16",
    "training.max_train_epochs": 3,
    "training.mixed_precision": "bf16",
    "training.optimizer.betas": [0.8, 0.99],
    "training.optimizer.args": {"amsgrad": True},
    "training.scheduler.warmup_steps": 2,
    "training.scheduler.warmup_ratio": 0.5,
    "training.scheduler.args": {"num_cycles": 2},
    "training.loss.min_snr_gamma": 5.0,
    "training.components.denoiser": 5e-4,
    "training.components.text_encoder_1": 5e-4,
    "training.checkpoints.every_n_epochs": 1,
    "training.checkpoints.keep": 1,
    "training.checkpoints.state_every_n_steps": 1,
    "sampling.every_n_steps": 3,
    "sampling.every_n_epochs": 1,
    "sampling.prompt_file": "copied_prompts.txt",
    "sampling.dialect": "kohya",
    "sampling.negative_prompt": "n",
    "sampling.width": 16,
    "sampling.height": 16,
    "sampling.num_inference_steps": 3,
    "sampling.cfg_scale": 2.0,
    "sampling.sampler": "euler",
    "sampling.prompts.prompt": "other",
    "sampling.prompts.seed": 5,
    "selection.strategy": "last",
    "selection.metrics": [],
    "selection.step": 2,
    "selection.veto.max_loss_above_base": 0.5,
    "selection.veto.max_similarity": 0.5,
    "selection.publish.name": "x",
    "selection.publish.directory": "elsewhere",
}
SDXL: dict[str, Any] = {"model": {"family": "sdxl", "checkpoint": "sdxl"}}
SD3: dict[str, Any] = {"model": {"family": "sd3", "checkpoint": "sd3"}, "network": {"conv_rank": None}}
WHOLE: dict[str, Any] = {"network": None, "selection": {"publish": []}}
# What a key needs beside it to make a difference, or to be valid at all.
BESIDE: dict[str, dict[str, Any]] = {
    "network.conv_alpha": {},
    "network.conv_rank": {},
    "model.text_encoder_2": SDXL,
    "model.tokenizer_2": SDXL,
    "training.components.text_encoder_2": SDXL,
    "model.text_encoder_3": SD3,
    "model.tokenizer_3": SD3,
    "training.components.text_encoder_3": SD3,
    "training.timesteps.weighting": SD3,
    "training.timesteps.mean": {"training": {"timesteps": {"sampling": "logit_normal"}}},
    "training.timesteps.std": {"training": {"timesteps": {"sampling": "logit_normal"}}},
    "training.timesteps.sigmoid_scale": {"training": {"timesteps": {"sampling": "sigmoid"}}},
    "training.timesteps.mode_scale": {"training": {"timesteps": {"sampling": "mode"}}},
    "training.timesteps.beta_alpha": {"training": {"timesteps": {"sampling": "beta"}}},
    "training.timesteps.beta_beta": {"training": {"timesteps": {"sampling": "beta"}}},
    "network.decompose_factor": {"network": {"type": "lokr", "rank": 2, "conv_rank": None}},
    "training.optimizer.stochastic_rounding": WHOLE,
    "training.loss.scale_v_pred_loss_like_noise_pred": {"model": {"prediction_type": "v_prediction"}},
    "training.memory.fused_backward": {**WHOLE, "training": {"max_grad_norm": 0.0}},
    "caching.vae_tile_size": {"dataset": {"resolution": 128}, "training": {"components": {"text_encoder_1": False}}},
    "training.loss.masked": {"dataset": {"alpha_mask": True}},
    "training.clip_grad": {"training": {"max_grad_norm": 1e-3}},
    "training.loss.multires_noise.iterations": {"training": {"loss": {"multires_noise": {"iterations": 3}}}},
    "training.loss.multires_noise.discount": {"training": {"loss": {"multires_noise": {"iterations": 3}}}},
    "model.from_scratch": {"network": None, "selection": {"publish": []}},
    "model.revision": {},
    "caching.text": {"training": {"components": {"text_encoder_1": False}}},
    "training.max_train_epochs": {"training": {"max_train_steps": None, "max_train_epochs": 2}},
    "dataset.keep_tokens": {"dataset": {"shuffle_caption": True, "caption_separator": " "}},
    "dataset.caption_separator": {"dataset": {"shuffle_caption": True}},
    "dataset.token_warmup_min": {"dataset": {"token_warmup_step": 4, "caption_separator": " "}},
    "dataset.held_out.count": {"dataset": {"held_out": {"count": 2}}},
    "dataset.held_out.fraction": {"dataset": {"held_out": {"count": None, "fraction": 0.1}}},
    "dataset.held_out.path": {"dataset": {"held_out": {"count": None, "path": "apart"}}},
    "dataset.held_out.resolution": {"dataset": {"held_out": {"count": None, "path": "apart"}}},
    "dataset.held_out.caption_extension": {"dataset": {"held_out": {"count": None, "path": "apart"}}},
    "dataset.sources.class_tokens": {"dataset": {"sources": [{"path": "bare", "class_tokens": "other"}]}},
    "training.scheduler.args": {"training": {"scheduler": {"type": "cosine_with_restarts"}}},
    "training.checkpoints.every_n_epochs": {"training": {"checkpoints": {"every_n_steps": None}}},
    "sampling.every_n_epochs": {"sampling": {"every_n_steps": None}},
    "training.loss.huber_c": {"training": {"loss": {"type": "huber"}}},
    "training.loss.huber_schedule": {"training": {"loss": {"type": "huber"}}},
    "training.loss.zero_terminal_snr": {"model": {"prediction_type": "v_prediction"}},
    "selection.step": {"selection": {"strategy": "manual", "step": 4}},
    "selection.metrics": {"selection": {"strategy": "last"}},
}
ONE_VALUE = {
    "schema_version",
    "model.family",
    "sampling.dialect",
    "dataset.config_file",
    "dataset.sources.kind",
    *(
        key.dotted
        for key in leaf_keys()
        if key.path[:2] == ("dataset", "held_out") and key.path[2] in Media.model_fields
    ),
    *VIDEO_KEYS,
}
"""Keys that have one value only, or none that could be flipped alone: each family has tests of its own."""
KEYS = [key for key in leaf_keys() if key.dotted not in ONE_VALUE]


def flipped(key: Key) -> Any:
    """Another valid value."""
    if key.dotted in FLIPS:
        return FLIPS[key.dotted]
    name = key.dotted.replace("dataset.sources.", "dataset.").replace("sampling.prompts.", "sampling.")
    if name in FLIPS:
        return FLIPS[name]
    default = key.default
    if isinstance(default, bool):
        return not default
    text = key.type_text
    if text.startswith('"') or " | " in text:
        choices = [json.loads(choice) for choice in text.split(" | ")]
        return next(choice for choice in choices if choice != default)
    if isinstance(default, int):
        return default + 1
    if isinstance(default, float):
        return default / 2 if default else 0.5
    raise AssertionError(f"{key.dotted}: say in FLIPS what another value is")


def at(key: Key, value: Any) -> dict[str, Any]:
    """A change of one key; arrays of tables are changed in their first entry."""
    if key.path[:2] == ("dataset", "sources"):
        first = {"path": "bare" if key.path[2] == "class_tokens" else "pics", key.path[2]: value}
        return {"dataset": {"sources": [first, {"path": "more", "regularization": key.path[2] != "regularization"}]}}
    if key.path[:2] == ("sampling", "prompts"):
        return {"sampling": {"prompts": [{"prompt": "a red circle", key.path[2]: value}]}}
    if key.path[:2] == ("selection", "publish"):
        return {"selection": {"publish": [{"directory": "published", key.path[2]: value}]}}
    change: Any = value
    for part in reversed(key.path):
        change = {part: change}
    return change


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Place:
    """A place with everything that a flipped key may name, the same content under other names."""
    made = new_place(tmp_path_factory.mktemp("effects") / "place", tiny_model)
    folder = made.folder
    draw_pictures(folder / "more", 3, seed=9)
    draw_pictures(folder / "apart", 2, seed=11)
    shutil.copytree(folder / "model", folder / "copy")
    for name in ("sdxl", "sd3"):
        family(name).tiny(folder / name)
        shutil.copytree(folder / name, folder / f"{name}_copy")
    for index, size in enumerate([(48, 32), (20, 20), (24, 128), (70, 41), (40, 30)]):
        drawn_at_random("star", "red", "white", random.Random(index)).resize(size).save(
            folder / "pics" / f"odd{index}.png"
        )
        (folder / "pics" / f"odd{index}.txt").write_text("a red star, bright, on white, drawn by hand")
    shutil.copytree(folder / "apart", folder / "copied_apart")
    shutil.copytree(folder / "pics", folder / "copied_pics")
    shutil.copytree(folder / "pics", folder / "bare", ignore=shutil.ignore_patterns("*.txt"))
    for name in ("pics", "more", "copied_pics", "apart", "copied_apart"):
        for file in list((folder / name).glob("*.txt")):
            file.with_suffix(".tags").write_text(f"{file.stem}, {{b|c}}, d ||| e, f;;;g, h")
            file.with_suffix(".caption").write_text(file.read_text() + " again")
    for name in ("prompts.txt", "copied_prompts.txt"):
        (folder / name).write_text("a blue star --s 2\n")
    for file in (folder / "pics").glob("odd*.*"):  # a face in their names, and transparency
        file.rename(file.with_name(f"{file.stem}_20_20_8_8{file.suffix}"))
    for file in (folder / "pics").glob("*.png"):
        picture = Image.open(file).convert("RGBA")
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
        picture.save(file)
        picture.getchannel("A").save((folder / "masks").joinpath(file.name)) if (folder / "masks").mkdir(
            exist_ok=True
        ) is None else None
    shutil.rmtree(folder / "copied_pics")
    shutil.copytree(folder / "pics", folder / "copied_pics")
    write_lora(made)
    return made


def write_lora(place: Place) -> None:
    """lora.safetensors: an adapter of the tiny model in Kohya's format."""
    from runner.formats.adapter_write import kohya_state
    from runner.weights.tensors import write_tensors

    run = prepared(place.write(BASE))
    targets = run.targets
    tensors = {
        f"{target.full_name}.{name}": torch.full(shape, 0.1)
        for target in targets
        for name, shape in adapter_shapes(target).items()
    }
    write_tensors(place.folder / "lora.safetensors", kohya_state(targets, tensors, torch.float32))


def state(place: Place, changes: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """(stage → fingerprint, bits) of a configuration."""
    run = prepared(place.write(changes))
    graph = compile_graph(run)
    return {name: node.fingerprint for name, node in graph.nodes.items()}, graph.runtime.bits()


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.dotted)
def test_declared_effect(key: Key, ground: Place) -> None:
    if key.dotted in ("network.init_from", "network.base_weights", "dataset.sources.mask_path"):
        pytest.skip("paths; that their content counts is tested in test_networks.py, test_kohya.py and below")
    beside = merged(BASE, BESIDE.get(key.dotted, {}))
    change = at(key, flipped(key))
    before, bits_before = state(ground, beside)
    after, bits_after = state(ground, merged(beside, change))
    changed = {name for name in before if before[name] != after[name]}
    if key.effect == "trajectory":
        assert changed & set(key.stages), f"declares {key.stages}, changed {changed}"
        assert bits_before == bits_after
    elif key.effect == "bits":
        assert not changed
        assert bits_before != bits_after
    else:
        assert changed <= {"publish", *key.stages}, f"declares none, changed {changed}"
        assert bits_before == bits_after


TRAINED = [
    key
    for key in KEYS
    if set(key.stages) & {"train", "cache.latents", "cache.text"}
    and key.path[:2] != ("dataset", "sources")
    and key.dotted
    not in {
        "training.max_train_epochs",
        "run.deterministic",
        "model.max_token_length",
        "dataset.buckets.max_size",
        "dataset.buckets.min_size",
        "dataset.token_warmup_min",
    }
]
"""Keys whose flip must show in the trained weights. Left out: keys that need another picture or a longer text to show;
they have tests of their own."""
TAGS = {
    "dataset.token_warmup_step",
    "dataset.shuffle_caption",
    "dataset.keep_tokens_separator",
    "dataset.secondary_separator",
    "dataset.enable_wildcard",
}
"""Keys that show only on captions made of tags."""


@pytest.mark.parametrize("key", TRAINED, ids=lambda key: key.dotted)
def test_training_shows_it(key: Key, ground: Place) -> None:
    lively = {
        "training": {"max_train_steps": 4, "components": {"text_encoder_1": True}, "checkpoints": {"every_n_steps": 4}},
        "dataset": {"caption_dropout_rate": 0.3},
    }
    beside = merged(merged(BASE, lively), BESIDE.get(key.dotted, {}))
    if key.dotted in TAGS:
        beside = merged({"dataset": {"caption_extension": ".tags"}}, beside)
    if key.path[0] == "caching" or key.dotted == "model.clip_skip":
        beside = merged(beside, {"training": {"components": {"text_encoder_1": False}}})
    value = _visible(key)
    before = trained_bytes(ground.write(beside))
    after = trained_bytes(ground.write(merged(beside, at(key, value))))
    if key.effect == "trajectory":
        assert before != after, f"{key.dotted} = {value!r} changed nothing"
    else:
        assert _distance(before, after) < 1e-4


def _visible(key: Key) -> Any:
    """A value whose effect shows within four steps."""
    return {
        "training.optimizer.eps": 1e-2,
        "dataset.keep_tokens": 3,
        "dataset.caption_tag_dropout_rate": 0.6,
        "dataset.caption_dropout_every_n_epochs": 1,
        "dataset.token_warmup_step": 4,
        "training.max_grad_norm": 1e-3,
        "training.max_train_steps": 3,
        "training.timesteps.min": 500,
        "training.timesteps.max": 500,
        "dataset.buckets.enabled": False,
        "training.optimizer.stochastic_rounding": True,
        "network.lora_plus_ratio": 16.0,
        "training.timesteps.mode_scale": -1.0,
        "training.loss.multires_noise.iterations": 1,
        "dataset.buckets.no_upscale": True,
        "dataset.buckets.step": 12,
        "dataset.random_crop": True,
        "training.loss.prior_loss_weight": 0.1,
        "training.loss.min_snr_gamma": 0.3,
        "training.ema.decay": 0.05,
        "dataset.caption_dropout_rate": 0.9,
    }.get(key.dotted, flipped(key))


def _distance(first: bytes, second: bytes) -> float:
    """The largest difference of two checkpoints' numbers."""
    from safetensors.torch import load

    one, two = load(first), load(second)
    assert set(one) == set(two)
    return max(float((one[name] - two[name]).abs().max()) for name in one)
