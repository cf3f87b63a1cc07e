"""HunyuanVideo text to video, torch-free: what a checkpoint holds, defaults, adapter targets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from runner.dataset.clips import ClipRule
from runner.families.hunyuan_video.architecture import BLOCK, comfyui_layer, hunyuan_layers
from runner.families.hunyuan_video.prompts import ready
from runner.families.identify import FileNames, Kind
from runner.families.locate import KeyPath
from runner.families.parts import classes
from runner.families.parts.checkpoint import Finder
from runner.families.parts.classes import AUTOENCODER_KL_HUNYUAN_VIDEO, CLIP_TEXT
from runner.families.parts.files import CHECKPOINT, CONFIGS
from runner.families.parts.joint_memory import entering, forward, saved, widest
from runner.families.parts.memory import DenoiserMemory, predict
from runner.families.parts.part import ModuleClass, Naming, Part
from runner.families.parts.targets import Adaptable, Names, Preset
from runner.families.spec import FLOW_REFUSED, TRANSFORMER_REFUSED, Defaults, FamilySpec, SwapRule
from runner.model.model import Component, Model, ModelProblem
from schemas import RunConfig
from schemas.families.flow import FlowPrompt, GuidancePrompt, SystemPrompt
from schemas.families.video import VideoPrompt

PLAIN = Naming("", "diffusers")
VAE = Part(
    name="vae",
    folder="vae",
    module=AUTOENCODER_KL_HUNYUAN_VIDEO,
    namings=(PLAIN, Naming("vae.", "diffusers")),
    key=("model", "vae"),
)
LLAMA = Part(
    name="text_encoder_1",
    folder="text_encoder",
    module=classes.LLAMA,
    namings=(PLAIN, Naming("model.", "diffusers"), Naming("language_model.model.", "diffusers")),
    key=("model", "text_encoder_1"),
    block=re.compile(r"^(layers\.\d+)\."),
)
CLIP = Part(
    name="text_encoder_2",
    folder="text_encoder_2",
    module=CLIP_TEXT,
    namings=(PLAIN, Naming("text_model.", "diffusers")),
    key=("model", "text_encoder_2"),
)
WIDE = re.compile(r"\.norm")
"""Modulations: small, and they decide much."""
TRANSFORMER = ModuleClass(
    name="HunyuanVideoTransformer3DModel",
    layers=hunyuan_layers,
    source="runner.families.hunyuan_video.transformer:HunyuanVideoTransformer",
    attention="runner.families.parts.attention:two_stream_attention",
)
FINDER = Finder(
    family="hunyuan_video",
    title="HunyuanVideo",
    shipped=CONFIGS / "hunyuan_video",
    parts=(
        Part(
            name="denoiser",
            folder="transformer",
            module=TRANSFORMER,
            namings=(PLAIN, Naming(""), Naming("model.model."), Naming("model.diffusion_model.")),
            block=re.compile(BLOCK),
            wide=WIDE,
        ),
        VAE,
        LLAMA,
        CLIP,
    ),
    indexes=("HunyuanVideoPipeline",),
)
TEXT_TOKENS = 256


def inspect(config: RunConfig, folder: Path) -> Model:
    """Reads headers and configurations only. Raises `ModelProblem`."""
    place, components = FINDER.components(config, folder)
    return video_model(config, folder, place, components, FINDER)


def video_model(
    config: RunConfig, folder: Path, place: Path, components: Mapping[str, Component], finder: Finder, **extra: Any
) -> Model:
    """The model of HunyuanVideo's components, after checking that they belong together. Raises `ModelProblem`."""
    transformer, vae = components["denoiser"].config, components["vae"].config
    llama, clip = components["text_encoder_1"].config, components["text_encoder_2"].config
    for name, own, wanted in (
        ("text_encoder_1", llama["hidden_size"], transformer["text_embed_dim"]),
        ("text_encoder_2", clip["hidden_size"], transformer["pooled_projection_dim"]),
    ):
        if own != wanted:
            key: KeyPath = ("model", name) if getattr(config.model, name) else CHECKPOINT
            raise ModelProblem(key, f"{name} gives {own} numbers a token, the transformer takes {wanted}")
    if vae["latent_channels"] != transformer["in_channels"]:
        raise ModelProblem(
            CHECKPOINT,
            f"the transformer takes {transformer['in_channels']} channels, the autoencoder has {vae['latent_channels']}",
            "an image-to-video model of HunyuanVideo takes more; it is no family here"
            if transformer["in_channels"] > 16
            else None,
        )
    tokenizers = finder.tokenizers(config, folder, place, components)
    if tokenizers.places["text_encoder_1"] is None:
        raise ModelProblem(
            ("model", "text_encoder_1") if config.model.text_encoder_1 else CHECKPOINT,
            "the LLaMA text encoder needs its tokenizer, which no weights file holds",
            "name its folder (tokenizer.json, tokenizer_config.json) with model.tokenizer_1",
        )
    factor = int(vae.get("spatial_compression_ratio", 8))
    return Model(
        family=finder.family,
        components=components,
        tokenizers=tokenizers.places,
        tokenizer_files=tokenizers.files,
        scheduler=finder.scheduler(place),
        native_size=640,
        latent_factor=factor,
        latent_channels=int(vae["latent_channels"]),
        bucket_step=factor * int(transformer["patch_size"]),
        size_multiple=factor * int(transformer["patch_size"]),
        text_tokens=TEXT_TOKENS,
        text_width=int(transformer["text_embed_dim"]),
        text_extra=int(transformer["pooled_projection_dim"]) + TEXT_TOKENS,
        label=place.name,
        frame_factor=int(vae.get("temporal_compression_ratio", 4)),
        **extra,
    )


def text_limit(model: Model, max_token_length: int) -> tuple[str, int]:
    """LLaMA's tokens after the template."""
    return "text_encoder_1", TEXT_TOKENS


REFUSED = {
    "model.prediction_type": "HunyuanVideo predicts the flow's velocity",
    "model.clip_skip": "its texts are LLaMA's last but two layer and CLIP's pooled output",
    "model.max_token_length": "its text is 256 tokens long",
    **FLOW_REFUSED,
    "training.components.text_encoder_1": "its text encoders do not train, in no tool; only the transformer does",
    "training.components.text_encoder_2": "its text encoders do not train, in no tool; only the transformer does",
    **TRANSFORMER_REFUSED,
    "sampling.prompt_weighting": "LLaMA reads sentences; weights of words are for CLIP alone",
}
"""Keys that neither HunyuanVideo nor FramePack can use."""


def swap_rule(model: Model, trains: bool) -> SwapRule:
    """As in musubi-tuner: half as many double-stream blocks, and twice the rest and one of the single-stream ones, of each
    kind all but one at most. At most 36 of the full model while training, and 38 else."""
    config = model.components["denoiser"].config
    doubles, singles = int(config["num_layers"]), int(config["num_single_layers"])

    def blocks(wanted: int) -> int:
        if not wanted:
            return 0
        return min(wanted // 2, doubles - 1) + min(2 * (wanted - wanted // 2) + 1, singles - 1)

    return SwapRule(max(1, 2 * (doubles - (2 if trains else 1))), blocks)


def comfyui_name(original: str) -> str:
    """ComfyUI's name of a module: of Kohya's names it knows two thirds, of those with dots all, but embedders otherwise
    (comfy/lora.py, supported_models.HunyuanVideo)."""
    dotted = re.sub(r"(_in|t_embedder)\.mlp\.0$|(c_embedder)\.linear_1$", r"\1\2.in_layer", original)
    dotted = re.sub(r"(_in|t_embedder)\.mlp\.2$|(c_embedder)\.linear_2$", r"\1\2.out_layer", dotted)
    return f"diffusion_model.{dotted}"


MUSUBI_MODULES = {"loha": "networks.loha", "lokr": "networks.lokr"}
"""musubi-tuner's modules of LyCORIS' kinds."""
_ADAPTABLE = Adaptable(
    parts=FINDER.parts[:1],
    names={"denoiser": Names(kohya="lora_unet_", diffusers="transformer.", by_original=True, comfyui=comfyui_name)},
    presets={
        "default": Preset(re.compile(BLOCK + r"(?!norm)(?!.*\.norm)"), fused=True),
        "attention": Preset(re.compile(BLOCK + r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$")),
    },
    example="transformer_blocks.0.attn.to_q",
    sister=hunyuan_layers,
    comfyui=comfyui_layer,
)


def recognise(file: FileNames) -> Kind | None:
    """FramePack's transformer is the same one with another embedder beside its own."""
    own = file.has("txt_in.individual_token_refiner.", "context_embedder.token_refiner.")
    return Kind("a HunyuanVideo transformer", "hunyuan_video") if own and not file.has("clean_x_embedder.") else None


HUNYUAN_VIDEO = FamilySpec(
    name="hunyuan_video",
    pipelines=("HunyuanVideoPipeline",),
    recognise=recognise,
    first_recipe="hunyuan-video-lora",
    other_names=("hunyuan", "hunyuanvideo", "hv", "hunyuan_video_t2v", "hunyuanvideo_t2v"),
    implementation="runner.families.hunyuan_video.model:HUNYUAN_VIDEO",
    title="HunyuanVideo",
    architecture="hunyuan-video",
    base_version="hunyuan_video",
    defaults=Defaults(
        dtype="bf16",
        num_inference_steps=20,
        cfg_scale=1.0,
        sampler="euler",
        dialect="musubi",
        prediction_type="flow",
        max_token_length=TEXT_TOKENS,
        timestep_sampling="shift",
        timestep_shift=7.0,
        resolution=(960, 544),
        sample_size=256,
        embedded_guidance=6.0,
        fps=24.0,
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
    samplers=("euler", "heun", "dpm++_2m", "unipc"),
    token_lengths=(TEXT_TOKENS,),
    network_modules={"lora": "networks.lora", **MUSUBI_MODULES},
    swap=swap_rule,
    tiles=(256, 128),
    clips=lambda model: ClipRule(fps=24.0, factor=model.frame_factor),
    whole_captions=True,
    text_limit=text_limit,
    prompt_parts=(VideoPrompt, GuidancePrompt, FlowPrompt, SystemPrompt),
    ready=ready,
    refused_keys=REFUSED,
)
