"""Puts a family's bundle together from what its files and components have in common with the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from torch import Tensor, nn

from runner.families.contract import Family, LoadOptions
from runner.families.parts.autoencode import decode_latents, encode_images
from runner.families.parts.checkpoint import Finder
from runner.families.parts.load import load_part
from runner.families.parts.part import Naming
from runner.families.parts.save import States, original_component, save_pipeline, single_file
from runner.families.spec import FamilySpec
from runner.model.model import Model


def bundle(
    spec: FamilySpec,
    finder: Finder,
    load_tokenizers: Callable[[Model], Mapping[str, Any]],
    encode_texts: Any,
    process: Any,
    denoise: Any,
    tiny: Callable[[Path], None],
    **more: Any,
) -> Family:
    """A family whose components are those of its finder."""
    parts = {part.name: part for part in finder.parts}

    def load(model: Model, name: str, options: LoadOptions) -> nn.Module:
        return load_part(parts[name], model, options)

    def recompute(name: str, module: nn.Module) -> None:
        resolve_name(parts[name].module.recompute)(module)

    def tile(vae: nn.Module, side: int | None, strip: int | None) -> None:
        kind = parts["vae"].module
        if side is not None or strip is not None:
            assert kind.tile is not None, f"nothing says how {kind.name} works in tiles"
            resolve_name(kind.tile)(vae, side, strip)

    def save(folder: Path, model: Model, states: States, prediction_type: str, zero_terminal_snr: bool) -> None:
        save_pipeline(finder, load_tokenizers(model), folder, model, states, prediction_type, zero_terminal_snr)

    def denoiser_file(model: Model, name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        part = parts[name]
        return original_component(part, model, state, Naming("", layers=part.saved.layers if part.saved else None))

    return Family(
        spec=spec,
        load=load,
        recompute=recompute,
        tile=tile,
        load_tokenizers=load_tokenizers,
        encode_texts=encode_texts,
        process=process,
        denoise=denoise,
        tiny=tiny,
        save_pipeline=save,
        single_file=lambda model, states: single_file(finder, model, states),
        denoiser_file=denoiser_file,
        **{"encode_images": encode_images, "decode_latents": decode_latents, **more},
    )
