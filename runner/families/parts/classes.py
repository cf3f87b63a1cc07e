"""The classes of diffusers and transformers that several families have; torch-free."""

from __future__ import annotations

import re

from runner.families.parts.autoencoder import vae_layers
from runner.families.parts.clip import clip_layers, projected_clip_layers, t5_layers
from runner.families.parts.llama import llama_layers, siglip_layers
from runner.families.parts.part import ModuleClass, transformers_class
from runner.families.parts.tokenizer_kinds import clip_tokenizer, llama_3_tokenizer, t5_tokenizer
from runner.families.parts.video_autoencoder import frames_at, video_vae_layers

_POSITIONS = "runner.families.parts.modules:fill_positions"
_CLIP_ADAPTABLE = re.compile(r"\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)$")

CLIP_TEXT = transformers_class(
    "CLIPTextModel",
    clip_layers,
    "clip_text_model",
    finish=_POSITIONS,
    adaptable=_CLIP_ADAPTABLE,
    outer="text_model.",
    tokenizer=clip_tokenizer,
)
CLIP_TEXT_PROJECTED = transformers_class(
    "CLIPTextModelWithProjection",
    projected_clip_layers,
    "clip_text_model",
    finish=_POSITIONS,
    adaptable=_CLIP_ADAPTABLE,
    tokenizer=clip_tokenizer,
)
T5_ENCODER = transformers_class(
    "T5EncoderModel",
    t5_layers,
    "t5",
    tied={"encoder.embed_tokens.weight": "shared.weight"},
    float32=re.compile(r"\.wo\."),  # its outputs overflow in fp16; transformers keeps these layers in fp32 too
    adaptable=re.compile(r"\.(SelfAttention\.[qkvo]|DenseReluDense\.w[io](_[01])?)$"),
    tokenizer=t5_tokenizer,
)
LLAMA = transformers_class(
    "LlamaModel", llama_layers, "llama", finish="runner.families.parts.modules:fill_angles", tokenizer=llama_3_tokenizer
)
SIGLIP_VISION = transformers_class(
    "SiglipVisionModel",
    siglip_layers,
    "siglip_vision_model",
    settings={"vision_use_head": False},
    finish=_POSITIONS,
    outer="vision_model.",
)
"""Without its pooling head, which nothing here uses."""

AUTOENCODER_KL = ModuleClass(
    name="AutoencoderKL",
    layers=vae_layers,
    tile="runner.families.parts.autoencode:tile",
    old_names={"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"},  # before diffusers 0.18
)
AUTOENCODER_KL_HUNYUAN_VIDEO = ModuleClass(
    name="AutoencoderKLHunyuanVideo",
    layers=video_vae_layers,
    finish="runner.families.parts.video_vae:whole_clips",
    tile="runner.families.parts.video_vae:tile",
    frames=frames_at,
)
