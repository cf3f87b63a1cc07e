"""FLUX.1, torch-free: what a checkpoint holds, its variants, defaults, adapter targets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from runner.families import references as seen
from runner.families.flux1.architecture import BLOCK, comfyui_layers, fitted, flux_layers
from runner.families.flux1.recognise import recognise
from runner.families.locate import KeyPath
from runner.families.parts.checkpoint import Finder
from runner.families.parts.classes import AUTOENCODER_KL, CLIP_TEXT, T5_ENCODER
from runner.families.parts.files import CHECKPOINT, CONFIGS, read_json
from runner.families.parts.joint_memory import entering, forward, saved, widest
from runner.families.parts.memory import DenoiserMemory, predict
from runner.families.parts.part import ModuleClass, Naming, Part
from runner.families.parts.targets import Adaptable, Names, Preset
from runner.families.parts.tokenizer_files import need_t5
from runner.families.prompts import stills
from runner.families.references import ReferenceRule
from runner.families.spec import FLOW_REFUSED, STILLS_REFUSED, TRANSFORMER_REFUSED, Defaults, FamilySpec, SwapRule
from runner.model.model import Model, ModelProblem, Stated
from schemas import RunConfig
from schemas.families.flow import FlowPrompt, GuidancePrompt
from schemas.families.references import ControlSource, ReferencesPrompt
from schemas.families.variants import VariantModel

TRANSFORMER = ModuleClass(
    name="FluxTransformer2DModel", layers=flux_layers, attention="runner.families.parts.attention:text_first_attention"
)
PLAIN = Naming("", "diffusers")
VAE = Part(
    name="vae",
    folder="vae",
    module=AUTOENCODER_KL,
    namings=(PLAIN, Naming("vae."), Naming("first_stage_model."), Naming("")),
    key=("model", "vae"),
)
FINDER = Finder(
    family="flux1",
    title="FLUX.1",
    shipped=CONFIGS / "flux1",
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
            wide=re.compile(r"\.norm"),
            fitted=fitted,
        ),
        VAE,
        Part(
            name="text_encoder_1",
            folder="text_encoder",
            module=CLIP_TEXT,
            namings=(PLAIN, Naming("text_model.", "diffusers"), Naming("text_encoders.clip_l.transformer.")),
            key=("model", "text_encoder_1"),
        ),
        Part(
            name="text_encoder_2",
            folder="text_encoder_2",
            module=T5_ENCODER,
            namings=(PLAIN, Naming("text_encoders.t5xxl.transformer.")),
            key=("model", "text_encoder_2"),
        ),
    ),
    indexes=("FluxPipeline", "FluxKontextPipeline"),
)
SHIFT = ((256, 0.5), (4096, 1.15))
"""(tokens, logarithm of the shift) between which it is a straight line: what FLUX.1 was trained and is sampled with."""
KONTEXT_SIZES = (
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
    (1024, 1024),
    (1104, 944),
    (1184, 880),
    (1248, 832),
    (1328, 800),
    (1392, 752),
    (1456, 720),
    (1504, 688),
    (1568, 672),
)
"""(width, height) that Kontext was trained with, in the order in which equally near ones are taken."""


def inspect(config: RunConfig, folder: Path) -> Model:
    """Reads headers and configurations only. Raises `ModelProblem`."""
    place, components = FINDER.components(config, folder)
    transformer, vae = components["denoiser"].config, components["vae"].config
    clip, t5 = components["text_encoder_1"].config, components["text_encoder_2"].config
    channels = int(vae["latent_channels"])
    if transformer["in_channels"] != 4 * channels or transformer["patch_size"] != 1:
        raise ModelProblem(
            CHECKPOINT,
            f"the transformer takes {transformer['in_channels']} numbers a token, the autoencoder gives {4 * channels} (a Fill, Canny or Depth model?)",
            "train on dev, schnell, Krea or Kontext",
        )
    for name, own, wanted in (
        ("text_encoder_1", clip["hidden_size"], transformer["pooled_projection_dim"]),
        ("text_encoder_2", t5["d_model"], transformer["joint_attention_dim"]),
    ):
        if own != wanted:
            key: KeyPath = ("model", name) if getattr(config.model, name) else CHECKPOINT
            raise ModelProblem(key, f"{name} gives {own} numbers a token, the transformer takes {wanted}")
    tokenizers = FINDER.tokenizers(config, folder, place, components)
    need_t5(config, tokenizers.places, 2)
    variant = _variant(config, place, bool(transformer["guidance_embeds"]))
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    scheduler = FINDER.scheduler(place)
    if variant.value == "schnell" and not place.is_dir():  # the shipped one is dev's
        scheduler |= {"shift": 1.0, "use_dynamic_shifting": False}
    return Model(
        family="flux1",
        components=components,
        tokenizers=tokenizers.places,
        tokenizer_files=tokenizers.files,
        scheduler=scheduler,
        native_size=1024,
        latent_factor=factor,
        latent_channels=channels,
        bucket_step=2 * factor,
        size_multiple=2 * factor,
        text_tokens=config.model.max_token_length or _tokens(variant.value),
        text_width=int(transformer["joint_attention_dim"]),
        text_extra=int(transformer["pooled_projection_dim"]),
        label=place.name,
        variant=variant.value,
        history=1.0 if variant.value == "kontext" else 0.0,
        pipeline="FluxKontextPipeline" if variant.value == "kontext" else "",
        stated={"model.variant": variant},
    )


def _variant(config: RunConfig, place: Path, guided: bool) -> Stated:
    """Which FLUX.1 it is, and what says so. Kontext has dev's keys: only names tell it."""
    given = config.model.variant
    if given is not None:
        if given == "schnell" and guided:
            raise ModelProblem(
                ("model", "variant"),
                f"{place} is no schnell: its transformer is told guidance",
                'set variant = "dev" or "kontext"',
            )
        return Stated(given, "run.toml")
    if not guided:
        return Stated("schnell", "the checkpoint is told no guidance")
    index = place / "model_index.json"
    if place.is_dir() and index.is_file() and read_json(index).get("_class_name") == "FluxKontextPipeline":
        return Stated("kontext", "the checkpoint's model_index.json")
    if "kontext" in place.name.lower():
        return Stated("kontext", "the checkpoint's name")
    return Stated("dev", "the checkpoint is told guidance, and nothing names Kontext")


def _tokens(variant: str) -> int:
    return 256 if variant == "schnell" else 512


ATTENTION = Preset(re.compile(BLOCK + r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$"))


def comfyui_name(original: str) -> str:
    """What ComfyUI calls a layer: it names the parameter of norms."""
    return f"{original}.scale" if original.endswith("_norm") else original


_ADAPTABLE = Adaptable(
    parts=tuple(part for part in FINDER.parts if part.name != "vae"),
    names={
        "denoiser": Names(kohya="lora_unet_", diffusers="transformer.", by_original=True, separate="lycoris_"),
        "text_encoder_1": Names(kohya="lora_te1_text_model_", diffusers="text_encoder.text_model."),
        "text_encoder_2": Names(kohya="lora_te3_", diffusers="text_encoder_2."),
    },
    presets={
        "default": Preset(re.compile(BLOCK), fused=True),
        "attention": ATTENTION,
        "diffusers": Preset(
            re.compile(
                BLOCK + r"(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2))$"
            )
        ),
    },
    example="transformer_blocks.0.attn.to_q",
    comfyui=comfyui_name,
)


def swap_rule(model: Model, trains: bool) -> SwapRule:
    """As in sd-scripts: half as many double-stream blocks and twice the rest of the single-stream ones, of each kind all
    but one at most. At most 35 of the full model."""
    config = model.components["denoiser"].config
    doubles, singles = int(config["num_layers"]), int(config["num_single_layers"])

    def blocks(wanted: int) -> int:
        return min(wanted // 2, doubles - 1) + min(2 * (wanted - wanted // 2), singles - 1)

    return SwapRule(max(1, 2 * min(doubles, singles // 2) - 3), blocks)


def references(model: Model) -> ReferenceRule | None:
    return ReferenceRule(1, _reference_size) if model.variant == "kontext" else None


def _reference_size(size: tuple[int, int]) -> tuple[int, int]:
    """The nearest of Kontext's sizes by aspect."""
    return min(KONTEXT_SIZES, key=lambda own: abs(size[0] / size[1] - own[0] / own[1]))


def remarks(config: RunConfig, model: Model) -> list[str]:
    """What wears off in training."""
    if model.variant != "schnell":
        return []
    return [
        "schnell is distilled to four steps, and training it directly wears that off: train on dev, or sample with more steps"
    ]


def of_variant(model: Model) -> Mapping[str, Any]:
    """What of the family is otherwise for a variant, and for a transformer that is told no guidance."""
    changes: dict[str, Any] = {}
    guidance = 2.5 if model.variant == "kontext" else 3.5
    defaults = replace(_DEFAULTS, embedded_guidance=guidance)
    if not model.components["denoiser"].config["guidance_embeds"]:
        defaults = replace(defaults, embedded_guidance=None)
        changes["refused_keys"] = {
            **_REFUSED,
            "training.embedded_guidance": STILLS_REFUSED["training.embedded_guidance"],
        }
    if model.variant == "schnell":
        defaults = replace(defaults, num_inference_steps=4, max_token_length=_tokens("schnell"), timestep_shift=1.0)
        changes["architecture"] = "flux-1-schnell"
    return {**changes, "defaults": defaults}


def _text_limit(model: Model, max_token_length: int) -> tuple[str, int]:
    """T5's tokens but for its end."""
    return "text_encoder_2", max_token_length - 1


_DEFAULTS = Defaults(
    dtype="bf16",
    num_inference_steps=28,
    cfg_scale=1.0,
    sampler="euler",
    dialect="musubi",
    prediction_type="flow",
    max_token_length=512,
    timestep_sampling="logit_normal",
    timestep_shift="resolution",
    embedded_guidance=3.5,
)
_THIRD = "FLUX.1 has two text encoders"
_REFUSED = {
    **{name: why for name, why in STILLS_REFUSED.items() if name != "training.embedded_guidance"},
    "training.raw_embedded_guidance": "FLUX.1 is told 1000 times the guidance in every tool",
    "model.prediction_type": "FLUX.1 predicts the flow's velocity",
    "model.clip_skip": "FLUX.1 takes CLIP's pooled output and T5's last layer",
    "sampling.prompt_weighting": "of CLIP only the pooled output is used, and T5 reads sentences",
    **FLOW_REFUSED,
    "model.text_encoder_3": _THIRD,
    "model.tokenizer_3": _THIRD,
    "training.components.text_encoder_3": _THIRD,
    **TRANSFORMER_REFUSED,
}

FLUX1 = FamilySpec(
    name="flux1",
    pipelines=("FluxPipeline", "FluxKontextPipeline"),
    recognise=recognise,
    title="FLUX.1",
    architecture="flux-1-dev",
    base_version="flux1",
    defaults=_DEFAULTS,
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
    text_limit=_text_limit,
    token_lengths=(77, 128, 154, 256, 512),
    network_modules={"lora": "networks.lora_flux"},
    swap=swap_rule,
    other_names=(
        "flux",
        "flux.1",
        "flux_1",
        "flux_dev",
        "flux1_dev",
        "flux_1_dev",
        "flux_krea",
        "flux_schnell",
        "flux1_schnell",
        "flux_kontext",
        "flux1_kontext",
        "kontext",
    ),
    names_hint='with variant = "dev", "schnell" or "kontext" where the checkpoint does not tell',
    controls='pictures with model.variant = "kontext" of family flux1',
    implementation="runner.families.flux1.model:FLUX1",
    model_parts=(VariantModel,),
    prompt_parts=(GuidancePrompt, FlowPrompt, ReferencesPrompt),
    ready=partial(stills, references=references),
    source_parts=(ControlSource,),
    items=partial(seen.items, references),
    sources=partial(seen.sources, references),
    derived=lambda model: {"model.variant": model.variant},
    shift_points=SHIFT,
    variants=("dev", "schnell", "kontext"),
    of_variant=of_variant,
    remarks=remarks,
    refused_keys=_REFUSED,
)
