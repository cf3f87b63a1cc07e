"""Encoding pictures and captions: what the cache stage stores and what training encodes at each use go through here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from runner.core.precision import DTYPES
from runner.core.rng import generator
from runner.data.images import PictureRequest
from runner.inputs import LatentEncoder
from runner.stages.context import Context

Encoding = dict[str, Tensor]


class LatentEncoding:
    """The autoencoder's encoder, loaded, with its settings."""

    def __init__(self, context: Context, encoder: LatentEncoder) -> None:
        self.context, self.settings = context, encoder
        self.module: nn.Module = context.load("vae")
        self.stored = DTYPES[encoder.stored_dtype]

    @torch.no_grad()
    def encode(
        self, requests: Sequence[PictureRequest], pixels: Sequence[Tensor], padded_to: int = 0
    ) -> list[Encoding]:
        """{"latents": [C, h, w]} of each picture, on the CPU. All views must be of one size. The batch is filled up to
        `padded_to` with its last picture, so that an encoding does not depend on how many were missing."""
        batch = torch.stack([*pixels, *[pixels[-1]] * (padded_to - len(pixels))])
        generators = None
        if self.settings.draw == "sample":
            padded = [*requests, *[requests[-1]] * (padded_to - len(requests))]
            generators = [generator(self.settings.seed, "latent", item.digest, str(item.view)) for item in padded]
        dtype = DTYPES[self.settings.dtype]
        latents = self.context.family.encode_images(self.module, batch.to(self.context.device, dtype), generators)
        kept = latents[: len(requests)].to("cpu", self.stored)
        return [{"latents": row.clone() if row.dim() else row} for row in kept]


class TextEncoding:
    """The text encoder and its tokenizer, loaded, with their settings."""

    def __init__(
        self, context: Context, stored_dtype: str, module: nn.Module | None = None, weighting: bool = False
    ) -> None:
        self.context = context
        self.module = context.load("text_encoder_1") if module is None else module
        self.tokenizer = context.family.load_tokenizer(context.runtime.model)
        self.stored = DTYPES[stored_dtype]
        self.weighting = weighting

    @torch.no_grad()
    def encode(self, texts: Sequence[str], padded_to: int = 0) -> list[Encoding]:
        """The conditioning of each text, on the CPU, in the stored dtype; padded like pictures."""
        batch = [*texts, *[texts[-1]] * (padded_to - len(texts))]
        found = self.context.family.encode_texts(
            self.module, self.tokenizer, batch, self.context.numerics, self.weighting
        )
        return [
            {name: tensor[row].to("cpu", self.stored) for name, tensor in found.items()} for row in range(len(texts))
        ]
