"""[caching]: how encoded pictures and captions are kept between epochs and runs."""

from __future__ import annotations

from typing import Literal

from schemas.base import Section, key

Place = Literal["disk", "memory", "off"]


class Caching(Section):
    """How encoded pictures and captions are kept. Entries are keyed by content and settings, so a stale one can never be used."""

    latents: Place | None = key(None, effect="none")
    """disk: encoded once, kept in the store. memory: encoded at each start. off: encoded at each use. Unset: disk, or off where random_crop makes every use differ."""

    text: Place | None = key(None, effect="none")
    """The same for captions. Unset: disk, or off where captions vary between uses or a text encoder is trained."""

    latent_batch_size: int = key(4, effect="bits", stage="cache.latents", ge=1, le=256)
    """Pictures encoded at once. The last batch is padded, so that an encoding never depends on its company."""

    text_batch_size: int = key(16, effect="bits", stage="cache.text", ge=1, le=1024)
    """Captions encoded at once."""

    latent_draw: Literal["mode", "sample"] = key("mode", effect="trajectory", stage="cache.latents")
    """The autoencoder gives a distribution: take its mode, or one sample that depends on seed and picture alone."""

    vae_tile_size: int | None = key(None, effect="trajectory", stage="cache.latents", ge=64, le=8192, multiple_of=8)
    """Encodes pictures larger than this in overlapping tiles of so many pixels on a side: less memory, slightly other latents. Unset: whole."""

    vae_chunk_size: int | None = key(None, effect="bits", stage="cache.latents", ge=8, le=1024)
    """Computes the convolutions over time in strips so many numbers wide (hunyuan_video, framepack): less memory, the same result. 32 or 16 is common. Unset: whole."""

    dtype: Literal["bf16", "fp16", "fp32"] | None = key(
        None, effect="trajectory", stage=("cache.latents", "cache.text")
    )
    """Precision of the stored encodings. Unset: that of training.mixed_precision, fp32 for "no"."""
