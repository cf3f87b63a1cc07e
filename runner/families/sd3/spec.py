"""Stable Diffusion 3 Medium and 3.5, torch-free: what a checkpoint holds, defaults, adapter targets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from runner.families.identify import FileNames, Kind
from runner.families.parts.checkpoint import Finder
from runner.families.parts.classes import AUTOENCODER_KL, CLIP_TEXT_PROJECTED, T5_ENCODER
from runner.families.parts.files import CHECKPOINT, CONFIGS
from runner.families.parts.memory import DenoiserMemory, predict
from runner.families.parts.part import ModuleClass, Naming, Part
from runner.families.parts.targets import Adaptable, Names, Preset
from runner.families.parts.tokenizer_files import need_t5
from runner.families.prompts import stills
from runner.families.sd3.architecture import fitted, mmdit_layers
from runner.families.sd3.memory import forward, saved
from runner.families.spec import FLOW_REFUSED, STILLS_REFUSED, TRANSFORMER_REFUSED, Defaults, FamilySpec
from runner.model.model import Model, ModelProblem
from schemas import RunConfig
from schemas.families.flow import FlowPrompt

TRANSFORMER = ModuleClass(
    name="SD3Transformer2DModel", layers=mmdit_layers, attention="runner.families.parts.attention:joint_attention"
)
FINDER = Finder(
    family="sd3",
    title="Stable Diffusion 3 Medium",
    shipped=CONFIGS / "sd3",
    parts=(
        Part(
            name="denoiser",
            folder="transformer",
            module=TRANSFORMER,
            namings=(Naming("", "diffusers"), Naming("model.diffusion_model."), Naming("")),
            block=re.compile(r"^(transformer_blocks\.\d+)\."),
            fitted=fitted,
        ),
        Part(
            name="vae",
            folder="vae",
            module=AUTOENCODER_KL,
            namings=(Naming("", "diffusers"), Naming("first_stage_model."), Naming("")),
            key=("model", "vae"),
        ),
        Part(
            name="text_encoder_1",
            folder="text_encoder",
            module=CLIP_TEXT_PROJECTED,
            namings=(Naming("", "diffusers"), Naming("text_encoders.clip_l.transformer.")),
            key=("model", "text_encoder_1"),
        ),
        Part(
            name="text_encoder_2",
            folder="text_encoder_2",
            module=CLIP_TEXT_PROJECTED,
            namings=(Naming("", "diffusers"), Naming("text_encoders.clip_g.transformer.")),
            key=("model", "text_encoder_2"),
        ),
        Part(
            name="text_encoder_3",
            folder="text_encoder_3",
            module=T5_ENCODER,
            namings=(Naming("", "diffusers"), Naming("text_encoders.t5xxl.transformer.")),
            key=("model", "text_encoder_3"),
            optional=True,
        ),
    ),
    indexes=("StableDiffusion3Pipeline",),
)


def inspect(config: RunConfig, folder: Path) -> Model:
    """Reads headers and configurations only. Raises `ModelProblem`."""
    place, components = FINDER.components(config, folder)
    transformer, vae = components["denoiser"].config, components["vae"].config
    clip = [components[name].config for name in ("text_encoder_1", "text_encoder_2")]
    pooled = sum(int(own["projection_dim"]) for own in clip)
    width = int(transformer["joint_attention_dim"])
    if pooled != transformer["pooled_projection_dim"] or sum(int(own["hidden_size"]) for own in clip) > width:
        raise ModelProblem(
            CHECKPOINT,
            f"the text encoders give {pooled} pooled numbers, the transformer takes {transformer['pooled_projection_dim']}",
        )
    tokenizers = FINDER.tokenizers(config, folder, place, components)
    if "text_encoder_3" in components:
        need_t5(config, tokenizers.places, 3)
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    patch = int(transformer["patch_size"])
    length = int(clip[0]["max_position_embeddings"]) + (config.model.max_token_length or 256)
    return Model(
        family="sd3",
        components=components,
        tokenizers=tokenizers.places,
        tokenizer_files=tokenizers.files,
        scheduler=FINDER.scheduler(place),
        native_size=int(transformer["sample_size"]) * factor,
        latent_factor=factor,
        latent_channels=int(vae["latent_channels"]),
        bucket_step=factor * patch,
        size_multiple=factor * patch,
        text_tokens=length,
        text_width=width,
        text_extra=pooled,
        label=place.name,
    )


_ADAPTABLE = Adaptable(
    parts=tuple(part for part in FINDER.parts if part.name != "vae"),
    names={
        "denoiser": Names(kohya="lora_unet_", diffusers="transformer.", by_original=True, separate="lycoris_"),
        "text_encoder_1": Names(kohya="lora_te1_", diffusers="text_encoder."),
        "text_encoder_2": Names(kohya="lora_te2_", diffusers="text_encoder_2."),
        "text_encoder_3": Names(kohya="lora_te3_", diffusers="text_encoder_3."),
    },
    presets={
        "default": Preset(re.compile(r"^transformer_blocks\."), fused=True),
        "attention": Preset(re.compile(r"\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$")),
    },
    example="transformer_blocks.0.attn.to_q",
)
_MEMORY = partial(predict, DenoiserMemory(parts=FINDER.parts, saved=saved, forward=forward))


def _text_limit(model: Model, max_token_length: int) -> tuple[str, int]:
    """T5's tokens but for its end; CLIP's where there is no T5."""
    if "text_encoder_3" in model.components:
        return "text_encoder_3", max_token_length - 1
    return "text_encoder_1", int(model.components["text_encoder_1"].config["max_position_embeddings"]) - 2


def of_variant(model: Model) -> Mapping[str, Any]:
    """What is otherwise for Stable Diffusion 3.5."""
    config = model.components["denoiser"].config
    if not config.get("qk_norm"):
        return {}
    size = "medium" if config.get("dual_attention_layers") else "large"
    return {
        "title": f"Stable Diffusion 3.5 {size.capitalize()}",
        "architecture": f"stable-diffusion-3-5-{size}",
        "base_version": f"sd3_5_{size}",
        "defaults": replace(SD3.defaults, cfg_scale=4.5),
    }


def recognise(file: FileNames) -> Kind | None:
    """FLUX.1's and Chroma's context embedders are called alike."""
    if file.has("single_transformer_blocks.", "token_refiner."):
        return None
    if not file.has("joint_blocks.", "context_embedder.weight"):
        return None
    return Kind(f"a Stable Diffusion {'3.5' if file.has('ln_q.', 'norm_q.') else '3'} checkpoint", "sd3")


SD3 = FamilySpec(
    name="sd3",
    pipelines=("StableDiffusion3Pipeline",),
    recognise=recognise,
    other_names=(
        "sd_3",
        "sd3_medium",
        "stable_diffusion_3",
        "sd3.0",
        "sd3.5",
        "sd35",
        "sd3_5",
        "sd3.5_medium",
        "sd3.5_large",
    ),
    implementation="runner.families.sd3.model:SD3",
    title="Stable Diffusion 3 Medium",
    architecture="stable-diffusion-3-medium",
    base_version="sd3_m",
    defaults=Defaults(
        dtype="bf16",
        num_inference_steps=28,
        cfg_scale=7.0,
        sampler="euler",
        dialect="kohya",
        prediction_type="flow",
        clip_skip=2,
        max_token_length=256,
        timestep_sampling="logit_normal",
        timestep_shift=3.0,
    ),
    inspect=inspect,
    targets=_ADAPTABLE.targets,
    layers=_ADAPTABLE.layers,
    memory=_MEMORY,
    blocks=FINDER.blocks,
    samplers=("euler", "heun", "dpm++_2m", "unipc"),
    of_variant=of_variant,
    prompt_parts=(FlowPrompt,),
    ready=stills,
    text_limit=_text_limit,
    token_lengths=(77, 128, 154, 256, 512),
    network_modules={"lora": "networks.lora_sd3"},
    refused_keys={
        **STILLS_REFUSED,
        "model.prediction_type": "Stable Diffusion 3 predicts the flow's velocity",
        "model.clip_skip": "Stable Diffusion 3 always takes the last but one layer of CLIP",
        **FLOW_REFUSED,
        **TRANSFORMER_REFUSED,
    },
)
