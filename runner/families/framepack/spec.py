"""FramePack, torch-free: what a checkpoint holds, its variants, defaults, adapter targets."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from runner.dataset.clips import ClipRule
from runner.families.framepack.architecture import framepack_layers
from runner.families.framepack.items import items, sources
from runner.families.framepack.prompts import ready
from runner.families.hunyuan_video.architecture import BLOCK, comfyui_layer, hunyuan_layers
from runner.families.hunyuan_video.spec import (
    CLIP,
    LLAMA,
    MUSUBI_MODULES,
    PLAIN,
    REFUSED,
    TEXT_TOKENS,
    VAE,
    WIDE,
    swap_rule,
    text_limit,
    video_model,
)
from runner.families.identify import FileNames, Kind
from runner.families.parts.checkpoint import Finder
from runner.families.parts.classes import SIGLIP_VISION
from runner.families.parts.files import CHECKPOINT, CONFIGS
from runner.families.parts.joint_memory import entering, forward, saved, widest
from runner.families.parts.memory import DenoiserMemory, predict
from runner.families.parts.part import ModuleClass, Naming, Part
from runner.families.parts.targets import Adaptable, Names, Preset
from runner.families.spec import Defaults, FamilySpec
from runner.model.model import Model, ModelProblem
from schemas import RunConfig
from schemas.families.flow import FlowPrompt, GuidancePrompt, SystemPrompt
from schemas.families.framepack import OneFrameSource, SectionsModel, SectionsPrompt
from schemas.families.references import ControlSource, ReferencesPrompt
from schemas.families.variants import VariantModel
from schemas.families.video import VideoPrompt

WINDOW = 9
TRANSFORMER = ModuleClass(
    name="HunyuanVideoFramepackTransformer3DModel",
    layers=framepack_layers,
    source="runner.families.framepack.transformer:FramepackTransformer",
    attention="runner.families.parts.attention:two_stream_attention",
)
FINDER = Finder(
    family="framepack",
    title="FramePack",
    shipped=CONFIGS / "framepack",
    parts=(
        Part(
            name="denoiser",
            folder="transformer",
            module=TRANSFORMER,
            namings=(PLAIN, Naming("")),
            block=re.compile(BLOCK),
            wide=WIDE,
        ),
        VAE,
        LLAMA,
        CLIP,
        Part(
            name="image_encoder",
            folder="image_encoder",
            module=SIGLIP_VISION,
            namings=(Naming("vision_model.", "diffusers"), PLAIN),
            key=("model", "image_encoder"),
        ),
    ),
    indexes=("HunyuanVideoFramepackPipeline",),
)


def inspect(config: RunConfig, folder: Path) -> Model:
    """Reads headers and configurations only. Raises `ModelProblem`."""
    place, components = FINDER.components(config, folder)
    transformer, vision = components["denoiser"].config, components["image_encoder"].config
    if vision["hidden_size"] != transformer["image_proj_dim"]:
        raise ModelProblem(
            ("model", "image_encoder") if config.model.image_encoder else CHECKPOINT,
            f"the image encoder gives {vision['hidden_size']} numbers, the transformer takes {transformer['image_proj_dim']}",
        )
    window = config.model.latent_window_size or WINDOW
    one = config.model.variant == "one_frame"
    return video_model(
        config,
        folder,
        place,
        components,
        FINDER,
        variant=config.model.variant or "i2v",
        window=window,
        history=2.5 if not one else 3.0,
        image_tokens=(vision["image_size"] // vision["patch_size"]) ** 2,
    )


_ADAPTABLE = Adaptable(
    parts=FINDER.parts[:1],
    names={"denoiser": Names(kohya="lora_unet_", diffusers="transformer.")},
    presets={
        "default": Preset(re.compile(BLOCK + r"(?!norm)(?!.*\.norm)")),
        "attention": Preset(re.compile(BLOCK + r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$")),
    },
    example="transformer_blocks.0.attn.to_q",
    sister=hunyuan_layers,
    comfyui=comfyui_layer,
)


def recognise(file: FileNames) -> Kind | None:
    return Kind("a FramePack transformer", "framepack") if file.has("clean_x_embedder.") else None


FRAMEPACK = FamilySpec(
    name="framepack",
    pipelines=("HunyuanVideoFramepackPipeline",),
    recognise=recognise,
    first_recipe="framepack-lora",
    other_names=("frame_pack", "fpack", "framepack_f1", "framepack_i2v"),
    names_hint='with variant = "i2v", "f1" or "one_frame"',
    controls='pictures with model.variant = "one_frame" of family framepack',
    implementation="runner.families.framepack.model:FRAMEPACK",
    title="FramePack",
    architecture="framepack",
    base_version="framepack",
    defaults=Defaults(
        dtype="bf16",
        num_inference_steps=25,
        cfg_scale=1.0,
        sampler="unipc",
        dialect="musubi",
        prediction_type="flow",
        max_token_length=TEXT_TOKENS,
        timestep_sampling="shift",
        timestep_shift=3.0,
        resolution=(640, 640),
        sample_size=640,
        embedded_guidance=10.0,
        fps=30.0,
    ),
    inspect=inspect,
    targets=_ADAPTABLE.targets,
    layers=_ADAPTABLE.layers,
    memory=partial(
        predict,
        DenoiserMemory(
            parts=FINDER.parts, saved=saved, forward=forward, widest=widest, entering=entering, guided=False
        ),
    ),
    blocks=FINDER.blocks,
    samplers=("unipc",),
    token_lengths=(TEXT_TOKENS,),
    network_modules={"lora": "networks.lora_framepack", **MUSUBI_MODULES},
    variants=("i2v", "f1", "one_frame"),
    prompt_parts=(VideoPrompt, GuidancePrompt, FlowPrompt, SystemPrompt, SectionsPrompt, ReferencesPrompt),
    ready=ready,
    derived=lambda model: {"model.variant": model.variant, "model.latent_window_size": model.window},
    model_parts=(VariantModel, SectionsModel),
    source_parts=(OneFrameSource, ControlSource),
    clips=lambda model: ClipRule(fps=30.0, factor=model.frame_factor),
    items=items,
    sources=sources,
    swap=swap_rule,
    tiles=(256, 128),
    whole_captions=True,
    text_limit=text_limit,
    refused_keys={
        **REFUSED,
        "training.raw_embedded_guidance": "FramePack is told 1000 times the guidance in every tool",
    },
)
