"""Files of FLUX.1, and of its relatives that nothing here trains; torch-free."""

from __future__ import annotations

from runner.families.identify import FileNames, Kind

_VARIANTS = {128: "Canny or Depth, which takes a control picture", 384: "Fill, which takes a picture and its hole"}
"""Channels of the first layer → what takes so many."""


def recognise(file: FileNames) -> Kind | None:
    """Chroma's and FLUX.2's blocks have the same names, HunyuanVideo's are like them."""
    if file.has("distilled_guidance_layer.", "nerf_blocks.", "txt_in.individual_token_refiner.", "token_refiner."):
        return None
    if file.has("double_stream_modulation_img."):
        return Kind("a FLUX.2 transformer")
    own = file.has("double_blocks.0.img_attn.norm.key_norm.") or (
        file.has("single_transformer_blocks.0.proj_mlp.") and file.has("transformer_blocks.0.attn.add_k_proj.")
    )
    if not own:
        alike = file.has("double_blocks.", "single_transformer_blocks.")
        return Kind("a checkpoint of the Flux kind") if alike else None
    first = file.shape("img_in.weight", "x_embedder.weight")
    if len(first) == 2 and first[1] in _VARIANTS:
        return Kind(f"a FLUX.1 transformer of {_VARIANTS[first[1]]}")
    return Kind("a FLUX.1 transformer", "flux1")
