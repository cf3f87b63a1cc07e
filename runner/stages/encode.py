"""Encoding pictures and captions: what the cache stage stores and what training encodes at each use go through here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from runner.core.precision import DTYPES
from runner.core.rng import generator
from runner.data.images import PictureRequest
from runner.inputs import LatentEncoder
from runner.stages.context import Context

Encoding = dict[str, Tensor]


def tile(vae: Any, size: int | None) -> None:
    """Has an autoencoder work in overlapping tiles of `size` pixels on a side; None: on whole pictures."""
    if size is not None:
        vae.enable_tiling()
        vae.tile_sample_min_size = size
        vae.tile_latent_min_size = size // 2 ** (len(vae.config.block_out_channels) - 1)


def load_text_encoders(context: Context, modules: Mapping[str, nn.Module] | None) -> dict[str, nn.Module]:
    """All text encoders of the model: those of `modules`, and the others loaded."""
    given = modules or {}
    return {name: given[name] if name in given else context.load(name) for name in context.runtime.model.text_encoders}


class LatentEncoding:
    """The autoencoder's encoder, loaded, with its settings."""

    def __init__(self, context: Context, encoder: LatentEncoder) -> None:
        self.context, self.settings = context, encoder
        self.module: nn.Module = context.load("vae")
        tile(self.module, encoder.tile_size)
        self.stored = DTYPES[encoder.stored_dtype]

    @torch.no_grad()
    def encode(
        self, requests: Sequence[PictureRequest], pixels: Sequence[Tensor], padded_to: int = 0
    ) -> list[Encoding]:
        """{"latents": [C, h, w]} of each picture, and its "mask" [1, h, w] where it has one, on the CPU. All views must
        be of one size. The batch is filled up to `padded_to` with its last picture, so that an encoding does not depend
        on how many were missing."""
        batch = torch.stack([*pixels, *[pixels[-1]] * (padded_to - len(pixels))])
        generators = None
        if self.settings.draw == "sample":
            padded = [*requests, *[requests[-1]] * (padded_to - len(requests))]
            generators = [generator(self.settings.seed, "latent", item.digest, str(item.view)) for item in padded]
        dtype = DTYPES[self.settings.dtype]
        latents = self.context.family.encode_images(self.module, batch.to(self.context.device, dtype), generators)
        kept = latents[: len(requests)].to("cpu", self.stored)
        found = [{"latents": row.clone() if row.dim() else row} for row in kept]
        for entry, request in zip(found, requests, strict=True):
            if request.mask is not None:
                size = entry["latents"].shape[-2:]
                mask = torch.nn.functional.interpolate(request.mask_pixels()[None], size, mode="area")[0]
                entry["mask"] = mask.to(self.stored)
        return found


class TextEncoding:
    """The text encoders and their tokenizers, loaded, with their settings. `modules` has those that are there already."""

    def __init__(
        self, context: Context, stored_dtype: str, modules: Mapping[str, nn.Module] | None = None, weighting: bool = False
    ) -> None:  # fmt: skip
        self.context = context
        self.modules = load_text_encoders(context, modules)
        self.tokenizers = context.family.load_tokenizers(context.runtime.model)
        self.stored = DTYPES[stored_dtype]
        self.weighting = weighting

    @torch.no_grad()
    def encode(self, texts: Sequence[str], padded_to: int = 0) -> list[Encoding]:
        """The conditioning of each text, on the CPU, in the stored dtype; padded like pictures."""
        batch = [*texts, *[texts[-1]] * (padded_to - len(texts))]
        found = self.context.family.encode_texts(
            self.modules, self.tokenizers, batch, self.context.numerics, self.weighting
        )
        return [
            {name: tensor[row].to("cpu", self.stored) for name, tensor in found.items()} for row in range(len(texts))
        ]
