"""Stable Diffusion 1.5 and XL, torch-free: what a checkpoint holds, defaults, adapter targets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from runner.config.prompt_options import SAMPLERS
from runner.families.parts.checkpoint import Finder
from runner.families.parts.classes import AUTOENCODER_KL, CLIP_TEXT, CLIP_TEXT_PROJECTED
from runner.families.parts.clip import open_clip_layers
from runner.families.parts.files import CHECKPOINT, CONFIGS
from runner.families.parts.memory import DenoiserMemory, predict
from runner.families.parts.part import ModuleClass, Naming, Part
from runner.families.parts.targets import Adaptable, Names, Preset
from runner.families.parts.unet import unet_layers
from runner.families.sd.memory import forward, saved
from runner.families.sd.noise import stated_noise
from runner.families.sd.recognise import recognise_sd15, recognise_sdxl
from runner.families.spec import STILLS_REFUSED, Defaults, FamilySpec
from runner.model.model import Component, Model, ModelProblem
from schemas import RunConfig

_UNET = Part(
    name="denoiser",
    folder="unet",
    module=ModuleClass(
        name="UNet2DConditionModel", layers=unet_layers, finish="runner.families.parts.modules:channels_last"
    ),
    namings=(Naming("", "diffusers"), Naming("model.diffusion_model."), Naming("")),
    block=re.compile(r"^(.*\.(?:resnets\.\d+|transformer_blocks\.\d+))\."),
)
_VAE = Part(
    name="vae",
    folder="vae",
    module=AUTOENCODER_KL,
    namings=(Naming("", "diffusers"), Naming("first_stage_model."), Naming("")),
    key=("model", "vae"),
)
_CLIP = (
    Naming("", "diffusers"),
    Naming("text_model.", "diffusers"),
    Naming("cond_stage_model.transformer."),
    Naming("cond_stage_model.transformer.", "diffusers"),
    Naming("text_encoders.clip_l.transformer."),
)
SD15_FINDER = Finder(
    family="sd15",
    title="Stable Diffusion 1.5",
    shipped=CONFIGS / "sd15",
    parts=(
        _UNET,
        _VAE,
        Part(
            name="text_encoder_1",
            folder="text_encoder",
            module=CLIP_TEXT,
            namings=_CLIP,
            key=("model", "text_encoder_1"),
        ),
    ),
    indexes=("StableDiffusionPipeline",),
    discrete=True,
)
SDXL_FINDER = Finder(
    family="sdxl",
    title="Stable Diffusion XL",
    shipped=CONFIGS / "sdxl",
    parts=(
        _UNET,
        _VAE,
        Part(
            name="text_encoder_1",
            folder="text_encoder",
            module=CLIP_TEXT,
            namings=(
                Naming("", "diffusers"),
                Naming("text_model.", "diffusers"),
                Naming("conditioner.embedders.0.transformer."),
                Naming("text_encoders.clip_l.transformer."),
            ),
            key=("model", "text_encoder_1"),
        ),
        Part(
            name="text_encoder_2",
            folder="text_encoder_2",
            module=CLIP_TEXT_PROJECTED,
            namings=(
                Naming("", "diffusers"),
                Naming("conditioner.embedders.1.model.", layers=open_clip_layers),
                Naming("text_encoders.clip_g.transformer."),
                Naming("", layers=open_clip_layers),
            ),
            key=("model", "text_encoder_2"),
        ),
    ),
    indexes=("StableDiffusionXLPipeline",),
    discrete=True,
)


def inspect_sd15(config: RunConfig, folder: Path) -> Model:
    """Reads headers and configurations only. Raises `ModelProblem`."""
    place, components = SD15_FINDER.components(config, folder)
    unet, text = components["denoiser"].config, components["text_encoder_1"].config
    if unet.get("addition_embed_type") is not None:
        raise ModelProblem(CHECKPOINT, f"{place} holds the U-Net of SDXL", 'set family = "sdxl"')
    _check_unet(place, components)
    if unet["cross_attention_dim"] != text["hidden_size"]:
        raise ModelProblem(
            ("model", "text_encoder_1") if config.model.text_encoder_1 else CHECKPOINT,
            f"the text encoder gives {text['hidden_size']} numbers a token, the U-Net takes {unet['cross_attention_dim']}",
        )
    return _model(config, folder, place, components, SD15_FINDER, int(text["hidden_size"]), 0)


def inspect_sdxl(config: RunConfig, folder: Path) -> Model:
    """Reads headers and configurations only. Raises `ModelProblem`."""
    place, components = SDXL_FINDER.components(config, folder)
    unet = components["denoiser"].config
    if unet.get("addition_embed_type") != "text_time":
        raise ModelProblem(CHECKPOINT, f"{place} does not hold the U-Net of SDXL", 'set family = "sd15"')
    _check_unet(place, components)
    first, second = (components[name].config for name in ("text_encoder_1", "text_encoder_2"))
    width = first["hidden_size"] + second["hidden_size"]
    if unet["cross_attention_dim"] != width:
        raise ModelProblem(
            CHECKPOINT, f"the text encoders give {width} numbers a token, the U-Net takes {unet['cross_attention_dim']}"
        )
    return _model(config, folder, place, components, SDXL_FINDER, width, int(second["projection_dim"]) + 6)


def _check_unet(place: Path, components: dict[str, Component]) -> None:
    channels, latent = components["denoiser"].config["in_channels"], components["vae"].config["latent_channels"]
    if channels != latent:
        raise ModelProblem(
            CHECKPOINT,
            f"the U-Net in {place} takes {channels} channels (an inpainting or depth model?)",
            "train on the plain text-to-image model",
        )


def _model(
    config: RunConfig,
    folder: Path,
    place: Path,
    components: dict[str, Component],
    finder: Finder,
    width: int,
    extra: int,
) -> Model:
    unet, vae = components["denoiser"].config, components["vae"].config
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    tokenizers = finder.tokenizers(config, folder, place, components)
    length = int(components["text_encoder_1"].config["max_position_embeddings"])
    pieces = (config.model.max_token_length or 75) // 75
    return Model(
        family=finder.family,
        components=components,
        tokenizers=tokenizers.places,
        tokenizer_files=tokenizers.files,
        scheduler=finder.scheduler(place),
        native_size=int(unet.get("sample_size", 64)) * factor,
        latent_factor=factor,
        latent_channels=int(vae["latent_channels"]),
        bucket_step=factor * 2 ** (len(unet["block_out_channels"]) - 1),
        size_multiple=factor,
        text_tokens=2 + (length - 2) * pieces,
        text_width=width,
        text_extra=extra,
        stated=stated_noise(place),
        label=config.model.checkpoint if config.model.checkpoint.startswith("builtin:") else place.name,
    )


_PRESETS = {
    "default": Preset(re.compile(r"\.attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.)")),
    "attention": Preset(re.compile(r"\.attn[12]\.(to_q|to_k|to_v|to_out\.0)$")),
}
_EXAMPLE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
_SD15_ADAPTABLE = Adaptable(
    parts=tuple(part for part in SD15_FINDER.parts if part.name != "vae"),
    names={
        "denoiser": Names(kohya="lora_unet_", diffusers="unet."),
        "text_encoder_1": Names(kohya="lora_te_text_model_", diffusers="text_encoder.text_model."),
    },
    presets=_PRESETS,
    example=_EXAMPLE,
    convolutional=True,
)
_SDXL_ADAPTABLE = Adaptable(
    parts=tuple(part for part in SDXL_FINDER.parts if part.name != "vae"),
    names={
        "denoiser": Names(kohya="lora_unet_", diffusers="unet.", by_original=True),
        "text_encoder_1": Names(kohya="lora_te1_text_model_", diffusers="text_encoder.text_model."),
        "text_encoder_2": Names(kohya="lora_te2_", diffusers="text_encoder_2."),
    },
    presets=_PRESETS,
    example=_EXAMPLE,
    convolutional=True,
)
_NO_FLOW = {
    "training.timesteps.weighting": "it is for flow matching; here min_snr_gamma and debiased_estimation weight the loss"
}


def _text_limit(model: Model, max_token_length: int) -> tuple[str, int]:
    """CLIP's tokens without the two ends, in as many pieces of 75 as max_token_length says."""
    length = int(model.components["text_encoder_1"].config["max_position_embeddings"]) - 2
    return "text_encoder_1", length * (max_token_length // 75)


def _unused_layers(config: RunConfig) -> Iterator[tuple[tuple[str, ...], str, str]]:
    skip = config.model.clip_skip
    if skip is not None and skip > 1 and config.training.components.text_encoder_1 and config.network is None:
        message = f"with clip_skip = {skip} the last layers of the text encoder are not used and will not train"
        yield ("model", "clip_skip"), message, "this is as in Kohya's tools"


SD15 = FamilySpec(
    name="sd15",
    pipelines=("StableDiffusionPipeline",),
    recognise=recognise_sd15,
    other_names=("sd", "sd1", "sd1.5", "sd_1.5", "sd_v1", "stable_diffusion", "stable_diffusion_1.5", "v1"),
    implementation="runner.families.sd.model:SD15",
    checks=_unused_layers,
    title="Stable Diffusion 1.5",
    architecture="stable-diffusion-v1",
    base_version="sd_v1",
    defaults=Defaults(dtype="bf16", num_inference_steps=30, cfg_scale=7.5, sampler="ddim", dialect="kohya"),
    inspect=inspect_sd15,
    targets=_SD15_ADAPTABLE.targets,
    layers=_SD15_ADAPTABLE.layers,
    memory=partial(predict, DenoiserMemory(parts=SD15_FINDER.parts, saved=saved, forward=forward)),
    blocks=SD15_FINDER.blocks,
    samplers=SAMPLERS,
    text_limit=_text_limit,
    token_lengths=(75, 150, 225),
    refused_keys={
        **STILLS_REFUSED,
        **_NO_FLOW,
        **{
            f"model.{name}": "Stable Diffusion 1.5 has one text encoder"
            for name in ("text_encoder_2", "text_encoder_3", "tokenizer_2", "tokenizer_3")
        },
        **{
            f"training.components.{name}": "Stable Diffusion 1.5 has one text encoder"
            for name in ("text_encoder_2", "text_encoder_3")
        },
    },
)
SDXL = FamilySpec(
    name="sdxl",
    pipelines=("StableDiffusionXLPipeline",),
    recognise=recognise_sdxl,
    other_names=("xl", "sd_xl", "stable_diffusion_xl", "pony", "illustrious", "sdxl_base"),
    implementation="runner.families.sd.model:SDXL",
    title="Stable Diffusion XL",
    architecture="stable-diffusion-xl-v1-base",
    base_version="sdxl_base_v1-0",
    defaults=Defaults(
        dtype="bf16", num_inference_steps=30, cfg_scale=7.0, sampler="euler", dialect="kohya", clip_skip=2
    ),
    inspect=inspect_sdxl,
    targets=_SDXL_ADAPTABLE.targets,
    layers=_SDXL_ADAPTABLE.layers,
    memory=partial(predict, DenoiserMemory(parts=SDXL_FINDER.parts, saved=saved, forward=forward)),
    blocks=SDXL_FINDER.blocks,
    samplers=SAMPLERS,
    text_limit=_text_limit,
    token_lengths=(75, 150, 225),
    version=2,  # sizes in fp32
    refused_keys={
        **STILLS_REFUSED,
        **_NO_FLOW,
        **dict.fromkeys(
            ("model.text_encoder_3", "model.tokenizer_3", "training.components.text_encoder_3"),
            "SDXL has two text encoders",
        ),
    },
)
