"""Encoding pictures and captions: what the cache stage stores and what training encodes at each use go through here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from runner.core.precision import DTYPES
from runner.data.images import PictureRequest
from runner.inputs.cache import LatentEncoder
from runner.rng import generator
from runner.stages.context import Context

Encoding = dict[str, Tensor]


def load_text_encoders(context: Context, modules: Mapping[str, nn.Module] | None) -> dict[str, nn.Module]:
    """All text encoders of the model: those of `modules`, and the others loaded."""
    given = modules or {}
    return {name: given[name] if name in given else context.load(name) for name in context.runtime.model.text_encoders}


class LatentEncoding:
    """The autoencoder's encoder, loaded, with its settings."""

    def __init__(self, context: Context, encoder: LatentEncoder) -> None:
        self.context, self.settings = context, encoder
        self.modules = {name: context.load(name) for name in context.family.picture_parts}
        context.family.tile(self.modules["vae"], encoder.tile_size, context.runtime.vae_chunk_size)
        self.stored = DTYPES[encoder.stored_dtype]

    @torch.no_grad()
    def encode(
        self, requests: Sequence[PictureRequest], pixels: Sequence[Tensor], padded_to: int = 0
    ) -> list[Encoding]:
        """{"latents": [C, h, w]} of each picture, [C, T, h, w] of each clip, its "mask" [1, h, w] where it has one, and
        what else the family keeps of it, on the CPU. All views must be of one size and length. The batch is filled up to `padded_to` with its last picture, so that an encoding does not depend
        on how many were missing."""
        batch = torch.stack([*pixels, *[pixels[-1]] * (padded_to - len(pixels))])
        generators = None
        if self.settings.draw == "sample":
            padded = [*requests, *[requests[-1]] * (padded_to - len(requests))]
            generators = [
                generator(
                    self.settings.seed, "latent", item.digest, str(item.view), *([item.clip.facts] if item.clip else [])
                )
                for item in padded
            ]
        dtype = DTYPES[self.settings.dtype]
        family, device = self.context.family, self.context.device
        latents = family.encode_images(self.modules["vae"], batch.to(device, dtype), generators)
        kept = latents[: len(requests)].to("cpu", self.stored)
        found = [{"latents": row.clone() if row.dim() else row} for row in kept]
        if family.encode_more is not None:
            for entry, request, own in zip(found, requests, pixels, strict=False):
                more = family.encode_more(self.modules, request, own, device, dtype)
                entry |= {name: tensor.to("cpu", self.stored) for name, tensor in more.items()}
        for entry, request in zip(found, requests, strict=True):
            if request.mask is not None:
                size = entry["latents"].shape[-2:]
                mask = torch.nn.functional.interpolate(request.mask_pixels()[None], size, mode="area")[0]
                wide = mask if entry["latents"].dim() == 3 else mask[:, None]
                entry["mask"] = wide.to(self.stored)
        return found


class TextEncoding:
    """The text encoders and their tokenizers, loaded, with their settings. `modules` has those that are there already."""

    def __init__(
        self,
        context: Context,
        stored_dtype: str,
        modules: Mapping[str, nn.Module] | None = None,
        weighting: bool = False,
    ) -> None:
        self.context = context
        self.modules = load_text_encoders(context, modules)
        self.tokenizers = context.family.load_tokenizers(context.runtime.model)
        self.stored = DTYPES[stored_dtype]
        self.weighting = weighting

    @torch.no_grad()
    def encode(self, texts: Sequence[str], padded_to: int = 0, system: str | None = None) -> list[Encoding]:
        """The conditioning of each text, on the CPU, in the stored dtype; padded like pictures. `system` replaces the
        system prompt of families that have one."""
        batch = [*texts, *[texts[-1]] * (padded_to - len(texts))]
        extra = {} if system is None else {"system": system}
        found = self.context.family.encode_texts(
            self.modules, self.tokenizers, batch, self.context.numerics, self.weighting, **extra
        )
        return [
            {name: tensor[row].to("cpu", self.stored) for name, tensor in found.items()} for row in range(len(texts))
        ]
