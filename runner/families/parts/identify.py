"""What a weights file is, from its key names and shapes alone; torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from runner.formats.adapter_names import is_adapter_file
from runner.model.layers import Shape


@dataclass(frozen=True)
class Kind:
    """A kind of file in words, and the family that trains it, where there is one."""

    words: str
    family: str | None = None


def identify(tensors: Mapping[str, tuple[str, Shape]]) -> Kind | None:
    """The kind of a file; None where it is unknown."""
    keys = list(tensors)

    def has(*parts: str) -> bool:
        return any(part in key for key in keys for part in parts)

    if is_adapter_file(keys) or has(".oft_diag"):
        return Kind("a LoRA file, not a checkpoint")
    if has("control_model.", "controlnet_cond_embedding"):
        return Kind("a ControlNet")
    flux = _flux(tensors, has)
    if flux is not None:
        return flux
    if has("joint_blocks.", "context_embedder.weight"):
        return Kind(f"a Stable Diffusion {'3.5' if has('ln_q.', 'norm_q.') else '3'} checkpoint", "sd3")
    if has("clean_x_embedder."):
        return Kind("a FramePack transformer", "framepack")
    if has("txt_in.individual_token_refiner.", "context_embedder.token_refiner."):
        return Kind("a HunyuanVideo transformer", "hunyuan_video")
    if has("double_blocks.", "single_transformer_blocks."):
        return Kind("a checkpoint of the Flux kind")
    if has("cond_stage_model.model."):
        return Kind("a Stable Diffusion 2 checkpoint")
    if has("conditioner.embedders.0.model.") and not has("conditioner.embedders.1."):
        return Kind("an SDXL refiner")
    if has("conditioner.embedders.1.", "label_emb.", "add_embedding.linear_1"):
        return _channels(tensors, Kind("an SDXL checkpoint", "sdxl"))
    if has("diffusion_model.", "input_blocks.", "down_blocks.") and has("attn2.to_k"):
        return _channels(tensors, Kind("a Stable Diffusion 1.5 checkpoint", "sd15"))
    if has("mlp.gate_proj."):
        return Kind("a LLaMA text encoder only")
    if has("vision_model.", "embeddings.patch_embedding."):
        return Kind("an image encoder only")
    if has("conv1.conv.weight"):
        return Kind("a video autoencoder only")
    if has("encoder.down"):
        return Kind("an autoencoder only")
    if has("text_model.", "token_embedding", "SelfAttention"):
        return Kind("a text encoder only")
    return None


def _flux(tensors: Mapping[str, tuple[str, Shape]], has: Callable[..., bool]) -> Kind | None:
    """FLUX.1 and its relatives; Chroma's and FLUX.2's blocks have the same names."""
    if has("double_stream_modulation_img."):
        return Kind("a FLUX.2 transformer")
    if has("nerf_blocks."):
        return Kind("a Chroma Radiance transformer, which works on pixels")
    if has("distilled_guidance_layer."):
        return Kind("a Chroma transformer", "chroma")
    if not has("double_blocks.0.img_attn.norm.key_norm.") and not (
        has("single_transformer_blocks.0.proj_mlp.") and has("transformer_blocks.0.attn.add_k_proj.")
    ):
        return None
    if has("txt_in.individual_token_refiner.", "context_embedder.token_refiner.", "clean_x_embedder."):
        return None
    first = next(
        (shape for key, (_, shape) in tensors.items() if key.endswith(("img_in.weight", "x_embedder.weight"))), ()
    )
    variants = {128: "Canny or Depth, which takes a control picture", 384: "Fill, which takes a picture and its hole"}
    if len(first) == 2 and first[1] in variants:
        return Kind(f"a FLUX.1 transformer of {variants[first[1]]}")
    return Kind("a FLUX.1 transformer", "flux1")


def _channels(tensors: Mapping[str, tuple[str, Shape]], kind: Kind) -> Kind:
    """Inpainting and other variants take more channels than the text-to-image model."""
    for key, (_, shape) in tensors.items():
        first = key.endswith(("input_blocks.0.0.weight", "conv_in.weight")) and "coder" not in key
        if first and len(shape) == 4 and shape[1] != 4:
            return Kind(f"{kind.words} of a variant that takes {shape[1]} channels (inpainting, depth or edit)")
    return kind
