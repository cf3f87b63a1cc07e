"""Files of Stable Diffusion 1.5 and XL, and of their relatives that nothing here trains; torch-free."""

from __future__ import annotations

from runner.families.identify import FileNames, Kind


def recognise_sd15(file: FileNames) -> Kind | None:
    """Its own, and Stable Diffusion 2's."""
    if file.has("cond_stage_model.model."):
        return Kind("a Stable Diffusion 2 checkpoint")
    if _is_xl(file) or not (file.has("diffusion_model.", "input_blocks.", "down_blocks.") and file.has("attn2.to_k")):
        return None
    return _channels(file, Kind("a Stable Diffusion 1.5 checkpoint", "sd15"))


def recognise_sdxl(file: FileNames) -> Kind | None:
    """Its own, and the refiner's."""
    if file.has("conditioner.embedders.0.model.") and not file.has("conditioner.embedders.1."):
        return Kind("an SDXL refiner")
    return _channels(file, Kind("an SDXL checkpoint", "sdxl")) if _is_xl(file) else None


def _is_xl(file: FileNames) -> bool:
    return file.has("conditioner.embedders.1.", "label_emb.", "add_embedding.linear_1")


def _channels(file: FileNames, kind: Kind) -> Kind:
    """Inpainting and other variants take more channels than the text-to-image model."""
    shape = file.shape("input_blocks.0.0.weight", "conv_in.weight", without="coder")
    if len(shape) == 4 and shape[1] != 4:
        return Kind(f"{kind.words} of a variant that takes {shape[1]} channels (inpainting, depth or edit)")
    return kind
