"""The ledger of what the source documents offer (docs/options.md): each option works here, or is refused with a reason.

Every row names keys of run.toml, options of the command line, or prompt letters; this test looks each of them up.
"""

from __future__ import annotations

import re
from typing import Any

import click
import pytest

from runner.config.foreign import FOREIGN_KEYS
from runner.config.prompt_options import DIALECTS
from runner.config.schema import all_keys
from schemas.sampling import Prompt

LEDGER: list[tuple[str, list[str], list[str], dict[str, str]]] = [
    # (option of the source, keys of run.toml, options of `runner sample`, letters of a dialect)
    ("--vae, --text_encoder1/2", ["model.vae", "model.text_encoder_1", "model.text_encoder_2"], [], {}),
    ("--vae_chunk_size", ["caching.vae_chunk_size", "sampling.vae_chunk_size"], ["--vae-chunk-size"], {}),
    (
        "--vae_spatial_tile_sample_min_size",
        ["caching.vae_tile_size", "sampling.vae_tile_size"],
        ["--vae-tile-size"],
        {},
    ),
    ("--fp8_llm", ["model.text_encoder_quantization"], [], {}),
    ("--sample_prompts", ["sampling.prompt_file", "sampling.prompts.prompt"], ["--prompt-file"], {}),
    (
        "--sample_every_n_epochs/steps, at_first",
        ["sampling.every_n_epochs", "sampling.every_n_steps", "sampling.at_first"],
        [],
        {},
    ),
    ("letters while training", [], [], {"musubi": "w h f d s g fs l n i ei im ci cim of vs"}),
    ("--dit", ["model.checkpoint"], ["--checkpoint"], {}),
    ("--image_encoder", ["model.image_encoder"], [], {}),
    ("--f1, --one_frame", ["model.variant"], [], {}),
    ("--latent_window_size", ["model.latent_window_size"], [], {}),
    (
        "--one_frame_no_2x, _4x",
        [
            "dataset.sources.one_frame.no_2x",
            "dataset.sources.one_frame.no_4x",
            "sampling.one_frame.no_2x",
            "sampling.one_frame.no_4x",
        ],
        ["--one-frame"],
        {},
    ),
    ("--batch_size", ["caching.text_batch_size", "caching.latent_batch_size", "dataset.batch_size"], [], {}),
    ("--sdpa, --attn_mode, --split_attn", ["model.attention", "model.split_attention"], [], {}),
    ("--mixed_precision", ["training.mixed_precision"], [], {}),
    ("--optimizer_type", ["training.optimizer.type"], [], {}),
    ("--learning_rate", ["training.learning_rate"], [], {}),
    ("--gradient_checkpointing", ["training.memory.gradient_checkpointing"], [], {}),
    ("--timestep_sampling", ["training.timesteps.sampling", "training.timesteps.sigmoid_scale"], [], {}),
    ("--weighting_scheme, --discrete_flow_shift", ["training.timesteps.weighting", "training.timesteps.shift"], [], {}),
    ("--max_data_loader_n_workers", ["dataset.workers"], [], {}),
    ("--network_dim, --network_args", ["network.type", "network.rank", "network.alpha", "network.targets"], [], {}),
    (
        "--max_train_epochs, --save_every_n_epochs",
        ["training.max_train_epochs", "training.checkpoints.every_n_epochs"],
        [],
        {},
    ),
    ("--seed, --output_dir, --output_name", ["run.seed", "run.output_dir", "run.name"], ["--seed", "--out"], {}),
    ("--blocks_to_swap", ["training.memory.blocks_to_swap", "sampling.blocks_to_swap"], ["--blocks-to-swap"], {}),
    ("--fp8, --fp8_scaled", ["model.quantization"], [], {}),
    ("frame_extraction, max_frames", ["dataset.sources.frame_extraction", "dataset.sources.max_frames"], [], {}),
    (
        "--image_path, --prompt with sections",
        ["sampling.prompts.image", "sampling.prompts.prompt"],
        ["--image", "--prompt"],
        {},
    ),
    ("--end_image_path", ["sampling.prompts.end_image"], ["--end-image"], {}),
    ("--latent_paddings", ["sampling.prompts.latent_paddings"], ["--latent-paddings"], {}),
    ("--video_size", ["sampling.prompts.width", "sampling.prompts.height"], ["--width", "--height"], {}),
    (
        "--video_seconds, --video_sections, --fps",
        ["sampling.prompts.seconds", "sampling.prompts.sections", "sampling.prompts.frames", "sampling.prompts.fps"],
        ["--seconds", "--sections", "--frames", "--fps"],
        {},
    ),
    ("--infer_steps", ["sampling.prompts.num_inference_steps"], ["--num-inference-steps"], {}),
    ("--embedded_cfg_scale", ["sampling.prompts.embedded_guidance"], ["--embedded-guidance"], {}),
    ("--guidance_scale", ["sampling.prompts.cfg_scale"], ["--cfg-scale"], {}),
    ("--guidance_rescale", ["sampling.prompts.guidance_rescale"], ["--guidance-rescale"], {}),
    ("--flow_shift", ["sampling.prompts.flow_shift"], ["--flow-shift"], {}),
    ("--sample_solver", ["sampling.prompts.sampler"], ["--sampler"], {}),
    ("--bulk_decode", ["sampling.prompts.bulk_decode"], ["--bulk-decode"], {}),
    ("--custom_system_prompt", ["sampling.prompts.custom_system_prompt"], ["--custom-system-prompt"], {}),
    (
        "--rope_scaling_*",
        ["sampling.prompts.rope_scaling_factor", "sampling.prompts.rope_scaling_timestep_threshold"],
        ["--rope-scaling-factor", "--rope-scaling-timestep-threshold"],
        {},
    ),
    ("--lora_weight, --lora_multiplier, patterns", ["network.base_weights"], ["--lora", "--include", "--exclude"], {}),
    ("--save_merged_model", [], ["--save-merged"], {}),
    ("--output_type, --save_path", [], ["--output-type", "--out"], {}),
    (
        "--from_file, --interactive",
        [],
        ["--prompt-file", "--interactive", "--dialect"],
        {"framepack": "w h f d s g l i n vs ei ci im cim of"},
    ),
    (
        "--control_image_path, masks",
        ["sampling.prompts.control_images", "sampling.prompts.control_masks", "sampling.prompts.image_mask"],
        ["--control-image", "--control-mask", "--image-mask"],
        {},
    ),
    (
        "002: CHECKPOINTING_STEPS, _LIMIT, MAX_NUM_STEPS",
        ["training.checkpoints.every_n_steps", "training.checkpoints.keep", "training.max_train_steps"],
        [],
        {},
    ),
    (
        "002: LR_SCHEDULE, LR_WARMUP_STEPS",
        ["training.scheduler.type", "training.scheduler.warmup_steps", "training.scheduler.warmup_ratio"],
        [],
        {},
    ),
    (
        "002: caption dropout, repeats, crops",
        [
            "dataset.caption_dropout_rate",
            "dataset.sources.repeats",
            "dataset.crop_style",
            "dataset.crop_aspect",
            "dataset.random_crop",
        ],
        [],
        {},
    ),
    (
        "002: duplicate and shuffle",
        ["dataset.shuffle_caption", "dataset.keep_tokens", "dataset.caption_separator"],
        [],
        {},
    ),
    ("002: symlinks, strip", ["selection.publish.directory", "selection.publish.mode"], [], {}),
    ("004: templates", ["dataset.config_file", "caching.latents", "dataset.sources.class_tokens"], [], {}),
]
REFUSED = ("xformers", "skip_existing", "persistent_data_loader_workers")
"""Options that have no key, because there is nothing to choose; who types one is told why."""


@pytest.mark.parametrize("row", LEDGER, ids=[row[0] for row in LEDGER])
def test_every_option_has_its_place(row: tuple[str, list[str], list[str], dict[str, str]]) -> None:
    from runner.cli.sample import command

    _, keys, options, letters = row
    assert keys or options or letters
    known = all_keys()
    for dotted in keys:
        assert dotted in known, dotted
        assert known[dotted].effect in ("trajectory", "bits", "none")
    flags = {flag for parameter in command.params if isinstance(parameter, click.Option) for flag in parameter.opts}
    assert set(options) <= flags
    for dialect, listed in letters.items():
        assert set(listed.split()) <= set(DIALECTS[dialect])


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_without_a_key_is_explained(name: str) -> None:
    assert FOREIGN_KEYS[name]


def test_values_of_the_documents() -> None:
    """The values that the documents name are values of our keys."""
    known = all_keys()
    expected: dict[str, Any] = {
        "model.quantization": "fp8_scaled",
        "model.text_encoder_quantization": "fp8",
        "training.timesteps.sampling": "shift",
        "model.variant": "one_frame",
        "dataset.sources.frame_extraction": "full",
        "sampling.sampler": "unipc",
        "training.timesteps.weighting": "none",
    }
    for dotted, value in expected.items():
        assert re.search(rf'"{value}"', known[dotted].type_text), dotted
    assert set(Prompt.model_fields) >= {"image", "end_image", "control_images", "one_frame", "latent_paddings"}
