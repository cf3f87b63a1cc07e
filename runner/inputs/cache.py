"""What the cache stages are given, and the keys of what they make; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from runner.dataset.buckets import View
from runner.dataset.item_facts import CAPTIONS, PICTURES, Column
from runner.facts import Fact, Tree, said, values
from runner.identity import canonical, identity

CACHE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LatentEncoder:
    """Everything but the picture that decides a latent."""

    weights: Mapping[str, Fact]
    """Component → digest of its weights."""
    dtype: str
    draw: str
    seed: int
    """Matters only where draw is "sample"."""
    stored_dtype: str
    tile_size: int | None = None

    def facts(self) -> Tree:
        return {
            "version": said(CACHE_VERSION),
            "weights": self.weights,
            "dtype": said(self.dtype, "model.dtype"),
            "draw": said(self.draw, "caching.latent_draw"),
            "seed": said(self.seed if self.draw == "sample" else None, "run.seed"),
            "stored_dtype": said(self.stored_dtype, "caching.dtype"),
            "tile_size": said(self.tile_size, "caching.vae_tile_size"),
        }

    @cached_property
    def identity(self) -> str:
        return identity("latents", canonical(values(self.facts())))

    def key(self, digest: str, view: View, batch_size: int) -> str:
        """Key of one stored latent. The padded batch may change its last bits, so it is part of the key."""
        return identity(self.identity, digest, f"{view.facts} {batch_size}")


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """Everything but the caption that decides its encoding."""

    weights: Tree
    """Digests of text encoders, tokenizers and the adapters that are merged first."""
    dtype: str
    clip_skip: int
    max_token_length: int
    stored_dtype: str
    quantization: str = "none"

    def facts(self) -> Tree:
        return {
            "version": said(CACHE_VERSION),
            "weights": self.weights,
            "dtype": said(self.dtype, "model.dtype"),
            "clip_skip": said(self.clip_skip, "model.clip_skip"),
            "max_token_length": said(self.max_token_length, "model.max_token_length"),
            "stored_dtype": said(self.stored_dtype, "caching.dtype"),
            "quantization": said(self.quantization, "model.text_encoder_quantization"),
        }

    @cached_property
    def identity(self) -> str:
        return identity("text", canonical(values(self.facts())))

    def key(self, text: str, batch_size: int) -> str:
        return identity(self.identity, text, str(batch_size))


@dataclass(frozen=True, kw_only=True)
class CachedItems:
    """The items whose encodings are kept."""

    trained: Tree
    measured: Tree
    seed: int
    varies: bool
    """Two uses of an item may have different encodings: they are drawn from the seed."""
    place: str
    """"disk", "memory" or "off"."""
    batch_size: int

    def facts(self, columns: Mapping[str, Column], place: str, batch_size: str) -> Tree:
        """`place` and `batch_size` are the keys of the two."""
        return {
            "trained": {name: self.trained[name] for name in columns},
            "measured": {name: self.measured[name] for name in columns},
            "seed": said(self.seed if self.varies else None, "run.seed"),
            "place": Fact(value=self.place, origin=(place,), hashed=False),
            "batch_size": Fact(value=self.batch_size, origin=(batch_size,), hashed=False),
        }


@dataclass(frozen=True)
class LatentsInputs:
    """cache.latents: the views of pictures to encode."""

    encoder: LatentEncoder
    items: CachedItems

    def facts(self) -> Tree:
        items = self.items.facts(PICTURES, "caching.latents", "caching.latent_batch_size")
        return {"encoder": self.encoder.facts(), **items}


@dataclass(frozen=True)
class TextsInputs:
    """cache.text: the captions to encode."""

    encoder: TextEncoder
    items: CachedItems

    def facts(self) -> Tree:
        columns = CAPTIONS | ({"picture": PICTURES["picture"]} if self.items.varies else {})
        items = self.items.facts(columns, "caching.text", "caching.text_batch_size")
        return {"encoder": self.encoder.facts(), **items}
