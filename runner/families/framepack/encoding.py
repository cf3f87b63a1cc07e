"""FramePack's pictures and clips: what is kept of them, and the sections that are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from runner.data.images import PictureRequest, to_picture, to_pixels
from runner.dataset.parts import ItemPart
from runner.families.contract import Conditioning, Shown
from runner.families.framepack.items import FramepackItem
from runner.families.framepack.sections import ZERO, Layout
from runner.families.parts.video_vae import encode_images

KNOWN = ("clean", "clean_2x", "clean_4x")
"""Names of the known frames: at full, half and a quarter of the resolution."""


def embed_picture(encoder: Any, picture: Tensor) -> Tensor:
    """SigLIP's tokens [M, V] of a picture [3, H, W] in -1..1, which Pillow resizes to the encoder's square, as SigLIP's
    own processor does."""
    side = encoder.config.image_size
    weight = encoder.embeddings.patch_embedding.weight
    square = to_pixels(to_picture(picture).resize((side, side), Image.Resampling.BICUBIC))[None]
    hidden: Tensor = encoder(pixel_values=square.to(weight.device, weight.dtype)).last_hidden_state
    return hidden[0]


def masked_latents(vae: nn.Module, picture: Tensor, alpha: Tensor | None, device: Any, dtype: Any) -> Tensor:
    """[C, 1, h, w] of one picture [3, H, W]; its transparency [1, H, W] takes places out."""
    latents = encode_images(vae, picture[None].to(device, dtype), None)[0]
    if alpha is None:
        return latents
    return latents * shrunk(alpha, latents.shape[-2], latents.shape[-1]).to(latents)


def shrunk(alpha: Tensor, height: int, width: int) -> Tensor:
    """A mask [1, H, W] in 0..1 at the size of latents, by Lanczos' filter as musubi-tuner does."""
    levels = Image.fromarray((alpha[0].numpy() * 255).round().astype(np.uint8), "L")
    small = levels.resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)[None]


def encode_more(
    modules: Mapping[str, nn.Module], request: PictureRequest, pixels: Tensor, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """{"image": [M, V]} of the first frame; of a picture with control images that of the first of them, and their
    latents {"controls": [C, N, h, w]}."""
    controls = request.fitted_pictures()
    first = controls[0][0] if controls else pixels if pixels.dim() == 3 else pixels[:, 0]
    found = {"image": embed_picture(modules["image_encoder"], first)}
    if controls:
        rows = [masked_latents(modules["vae"], picture, alpha, device, dtype) for picture, alpha in controls]
        found["controls"] = torch.cat(rows, dim=1)
    return found


def target(own: ItemPart | None, latents: Tensor) -> Tensor:
    """The frames of a section; one frame is all there is."""
    assert isinstance(own, FramepackItem)
    return latents if own.section is None else chosen_frames(latents, own.section.frames().target)


def conditioning(shown: Shown, encoding: Mapping[str, Tensor]) -> Conditioning:
    """What is known of an item: the other frames of its clip, or its control images. Of a prompt that changes from section
    to section, and its sampler says it (`known_frames`)."""
    own, latents = shown.own, encoding["latents"]
    assert isinstance(own, FramepackItem)
    if own.one_frame is None:
        assert own.section is not None
        section = own.section.frames()
        known = {name: chosen_frames(latents, getattr(section, name)) for name in KNOWN}
        return known_frames(section.layout, known, encoding["image"])
    layout = own.one_frame.layout()
    empty = latents.new_zeros(latents.shape[0], 1, *latents.shape[2:])
    post = [] if own.one_frame.no_post else [empty]
    known = {
        "clean": torch.cat([encoding["controls"], *post], dim=1),
        "clean_2x": empty.expand(-1, len(layout.clean_2x), -1, -1),
        "clean_4x": empty.expand(-1, len(layout.clean_4x), -1, -1),
    }
    return known_frames(layout, known, encoding["image"])


def known_frames(layout: Layout, known: Mapping[str, Tensor], image: Tensor) -> Conditioning:
    """What the denoiser is told of known frames [C, N, h, w] and an image's tokens, while training and sampling; frames that
    are left out are not told."""
    return {**{name: x for name, x in known.items() if x.shape[1]}, **positions(layout), "image": image}


def chosen_frames(latents: Tensor, frames: Sequence[int]) -> Tensor:
    """[C, N, h, w]: frames of [C, T, h, w], zeros where one is not there."""
    picked = latents[:, [max(frame, 0) for frame in frames]]
    there = torch.tensor([frame != ZERO for frame in frames]).view(1, -1, 1, 1)
    return picked * there.to(latents)


def positions(layout: Layout) -> dict[str, Tensor]:
    """Positions as the denoiser takes them, those of absent frames left out."""
    places = {"positions": layout.target, **{f"{name}_positions": getattr(layout, name) for name in KNOWN}}
    return {name: torch.tensor(at) for name, at in places.items() if at}
