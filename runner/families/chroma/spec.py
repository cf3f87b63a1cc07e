"""Chroma, torch-free: what a checkpoint holds, defaults, adapter targets."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from runner.families.chroma.architecture import chroma_layers, comfyui_layers, fitted
from runner.families.flux1.architecture import BLOCK
from runner.families.flux1.spec import ATTENTION, PLAIN, VAE, comfyui_name, swap_rule
from runner.families.identify import FileNames, Kind
from runner.families.parts.checkpoint import Finder
from runner.families.parts.classes import T5_ENCODER
from runner.families.parts.files import CHECKPOINT, CONFIGS
from runner.families.parts.joint_memory import entering, forward, saved, widest
from runner.families.parts.memory import DenoiserMemory, predict
from runner.families.parts.part import ModuleClass, Naming, Part
from runner.families.parts.targets import Adaptable, Names, Preset
from runner.families.parts.tokenizer_files import need_t5
from runner.families.prompts import stills
from runner.families.spec import FLOW_REFUSED, STILLS_REFUSED, TRANSFORMER_REFUSED, Defaults, FamilySpec
from runner.model.model import Model, ModelProblem
from schemas import RunConfig
from schemas.families.flow import FlowPrompt

TRANSFORMER = ModuleClass(
    name="ChromaTransformer2DModel",
    layers=chroma_layers,
    source="runner.families.chroma.transformer:ChromaTransformer",
    finish="runner.families.chroma.transformer:fill",
    attention="runner.families.chroma.transformer:use",
)
FINDER = Finder(
    family="chroma",
    title="Chroma",
    shipped=CONFIGS / "chroma",
    parts=(
        Part(
            name="denoiser",
            folder="transformer",
            module=TRANSFORMER,
            namings=(
                PLAIN,
                Naming("model.diffusion_model."),
                Naming(""),
                Naming("model.diffusion_model.", layers=comfyui_layers),
                Naming("", layers=comfyui_layers),
            ),
            block=re.compile(BLOCK),
            fitted=fitted,
        ),
        VAE,
        Part(
            name="text_encoder_1",
            folder="text_encoder",
            module=T5_ENCODER,
            namings=(PLAIN, Naming("text_encoders.t5xxl.transformer.")),
            key=("model", "text_encoder_1"),
        ),
    ),
    indexes=("ChromaPipeline",),
)
TEXT_TOKENS = 512


def inspect(config: RunConfig, folder: Path) -> Model:
    """Reads headers and configurations only. Raises `ModelProblem`."""
    place, components = FINDER.components(config, folder)
    transformer, vae = components["denoiser"].config, components["vae"].config
    t5, channels = components["text_encoder_1"].config, int(vae["latent_channels"])
    if transformer["in_channels"] != 4 * channels:
        raise ModelProblem(
            CHECKPOINT,
            f"the transformer takes {transformer['in_channels']} numbers a token, the autoencoder gives {4 * channels}",
        )
    if t5["d_model"] != transformer["joint_attention_dim"]:
        raise ModelProblem(
            ("model", "text_encoder_1") if config.model.text_encoder_1 else CHECKPOINT,
            f"text_encoder_1 gives {t5['d_model']} numbers a token, the transformer takes {transformer['joint_attention_dim']}",
        )
    tokenizers = FINDER.tokenizers(config, folder, place, components)
    need_t5(config, tokenizers.places, 1)
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return Model(
        family="chroma",
        components=components,
        tokenizers=tokenizers.places,
        tokenizer_files=tokenizers.files,
        scheduler=FINDER.scheduler(place),
        native_size=1024,
        latent_factor=factor,
        latent_channels=channels,
        bucket_step=2 * factor,
        size_multiple=2 * factor,
        text_tokens=config.model.max_token_length or TEXT_TOKENS,
        text_width=int(transformer["joint_attention_dim"]),
        text_extra=TEXT_TOKENS,
        label=place.name,
    )


_ADAPTABLE = Adaptable(
    parts=tuple(part for part in FINDER.parts if part.name != "vae"),
    names={
        "denoiser": Names(kohya="lora_unet_", diffusers="transformer.", by_original=True, separate="lycoris_"),
        "text_encoder_1": Names(kohya="lora_te1_", diffusers="text_encoder."),
    },
    presets={"default": Preset(re.compile(BLOCK), fused=True), "attention": ATTENTION},
    example="transformer_blocks.0.attn.to_q",
    comfyui=comfyui_name,
)
_ONE = "Chroma has one text encoder, T5"


def recognise(file: FileNames) -> Kind | None:
    """Radiance has the same approximator."""
    if file.has("nerf_blocks."):
        return Kind("a Chroma Radiance transformer, which works on pixels")
    return Kind("a Chroma transformer", "chroma") if file.has("distilled_guidance_layer.") else None


CHROMA = FamilySpec(
    name="chroma",
    pipelines=("ChromaPipeline",),
    recognise=recognise,
    other_names=("chroma1", "chroma_hd", "chroma1_hd", "chroma_unlocked"),
    implementation="runner.families.chroma.model:CHROMA",
    title="Chroma",
    architecture="chroma",
    base_version="chroma",
    defaults=Defaults(
        dtype="bf16",
        num_inference_steps=35,
        cfg_scale=5.0,
        sampler="euler",
        dialect="musubi",
        prediction_type="flow",
        max_token_length=TEXT_TOKENS,
        timestep_sampling="logit_normal",
        timestep_shift=1.0,
    ),
    inspect=inspect,
    targets=_ADAPTABLE.targets,
    layers=_ADAPTABLE.layers,
    memory=partial(
        predict, DenoiserMemory(parts=FINDER.parts, saved=saved, forward=forward, widest=widest, entering=entering)
    ),
    blocks=FINDER.blocks,
    samplers=("euler", "heun", "dpm++_2m", "unipc"),
    prompt_parts=(FlowPrompt,),
    ready=stills,
    text_limit=lambda model, max_token_length: ("text_encoder_1", max_token_length - 1),
    token_lengths=(77, 128, 154, 256, 512),
    network_modules={"lora": "networks.lora_flux"},
    swap=swap_rule,
    remarks=lambda config, model: (
        []
        if config.network is not None
        else ["the network that makes the modulations trains too; other tools leave it as it is"]
    ),
    refused_keys={
        **STILLS_REFUSED,
        **FLOW_REFUSED,
        "model.prediction_type": "Chroma predicts the flow's velocity",
        "model.clip_skip": "Chroma takes T5's last layer",
        "sampling.prompt_weighting": "T5 reads sentences; weights of words are for CLIP alone",
        **TRANSFORMER_REFUSED,
        **{f"model.{name}_{number}": _ONE for name in ("text_encoder", "tokenizer") for number in (2, 3)},
        **{f"training.components.text_encoder_{number}": _ONE for number in (2, 3)},
    },
)
