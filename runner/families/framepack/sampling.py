"""How FramePack makes a video: section after section, each from what is already known; and one frame from others.

Inverted anti-drifting makes the last section first, so that what is known are frames of the future; F1 goes forward. The
order of frames and the blending of decoded sections are those of the published program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from runner.core.task import moved
from runner.data.images import to_mask, to_pixels, transformed
from runner.dataset.buckets import Fit, cover
from runner.diffusion.unipc import sample, sigmas
from runner.errors import RunFailed
from runner.families.contract import Conditioning, Made, Texts
from runner.families.framepack.encoding import KNOWN, embed_picture, known_frames, masked_latents
from runner.families.framepack.prompts import FramepackPrompt
from runner.families.framepack.sections import Layout, forward_layout, inverted_layout, paddings, section_order
from runner.families.parts.autoencode import decode_latents
from runner.families.prompts import PromptFile, ReadyPrompt
from runner.model.model import Model
from runner.pictures import GROUND, has_alpha, read_picture

HISTORY = 19
"""Known frames beside the start: 1 + 2 + 16."""
TOKEN_AREA = 4
Denoise = Callable[[Tensor, Tensor, Conditioning], Tensor]


def _own(prompt: ReadyPrompt) -> FramepackPrompt:
    assert isinstance(prompt.own, FramepackPrompt)
    return prompt.own


# --- pictures ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_prompt(
    modules: Mapping[str, nn.Module], prompt: ReadyPrompt, device: torch.device, dtype: torch.dtype
) -> Conditioning:
    """What is known of a prompt's pictures, on the CPU: `start.N` latents and `image.N` embeddings of each section, `end`,
    and `controls`."""
    video = _own(prompt)
    found: dict[str, Tensor] = {}
    made: dict[str, tuple[Tensor, Tensor]] = {}
    for number, file in enumerate(video.images):
        if file.digest not in made:
            picture = to_pixels(_fitted(_opened(file), prompt))
            latents = masked_latents(modules["vae"], picture, None, device, dtype)
            made[file.digest] = latents, embed_picture(modules["image_encoder"], picture)
        found[f"start.{number}"], found[f"image.{number}"] = made[file.digest]
    if video.end_image is not None:
        found["end"] = masked_latents(
            modules["vae"], to_pixels(_fitted(_opened(video.end_image), prompt)), None, device, dtype
        )
    if video.controls:
        rows = []
        for file, mask in zip(video.controls, video.masks, strict=True):
            picture, alpha = _control(file, prompt, mask)
            rows.append(masked_latents(modules["vae"], picture, alpha, device, dtype))
        found["controls"] = torch.cat(rows, dim=1)
    return {name: tensor.float().cpu() for name, tensor in found.items()}


def _control(file: PromptFile, prompt: ReadyPrompt, mask: PromptFile | None) -> tuple[Tensor, Tensor | None]:
    """(pixels [3, H, W], what counts of them [1, H, W]: of the mask's file, else its own transparency)."""
    picture = _opened(file)
    if mask is not None:
        shape = _opened(mask)
        return to_pixels(_fitted(picture, prompt)), to_mask(shape, _view(shape, prompt), False)
    if has_alpha(picture):
        return to_pixels(_fitted(picture, prompt, None)), to_mask(picture, _view(picture, prompt), True)
    return to_pixels(_fitted(picture, prompt)), None


def _opened(file: PromptFile) -> Image.Image:
    try:
        return read_picture(file.path)
    except OSError as error:
        raise RunFailed(f"{file.path} cannot be read any more: {error.strerror}", hint="apply again") from None


def _fitted(picture: Image.Image, prompt: ReadyPrompt, ground: str | None = GROUND) -> Image.Image:
    return transformed(picture, _view(picture, prompt), ground)


def _view(picture: Image.Image, prompt: ReadyPrompt) -> Any:
    bucket = (prompt.width, prompt.height)
    return Fit(bucket, cover(picture.size, bucket), picture.size, True).centre


# --- latents ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    call: Denoise,
    modules: Mapping[str, Any],
    prompt: ReadyPrompt,
    texts: Texts,
    pictures: Conditioning,
    model: Model,
    device: torch.device,
) -> Tensor:
    """Latents fp32 [1, C, T, h, w]: of all sections with the start frame, or of one frame."""
    video, denoiser = _own(prompt), modules["denoiser"]
    assert prompt.seed is not None
    maker = _Maker(
        call, denoiser, prompt, video, texts, {name: x.to(device) for name, x in pictures.items()}, model, device
    )
    try:
        if video.one_frame is not None:
            return maker.one_frame()
        return maker.forward() if model.variant == "f1" else maker.inverted()
    finally:
        denoiser.rope_scale = 1.0


class _Maker:
    def __init__(
        self,
        call: Denoise,
        denoiser: Any,
        prompt: ReadyPrompt,
        video: FramepackPrompt,
        texts: Texts,
        pictures: Conditioning,
        model: Model,
        device: torch.device,
    ) -> None:
        self.call, self.denoiser, self.prompt = call, denoiser, prompt
        self.video, self.texts, self.pictures = video, texts, pictures
        self.model, self.device, self.window = model, device, model.window
        self.generator = torch.Generator().manual_seed(prompt.seed or 0)  # goes on from section to section
        self.size = model.latent_shape((prompt.width, prompt.height))

    def inverted(self) -> Tensor:
        """The last section first: each knows the start and the frames that come after it."""
        sections, history = self.video.sections, self._zeros(HISTORY)
        ahead = self.video.paddings or paddings(sections)
        if "end" in self.pictures:  # it stays behind what is made, as the last frame of the future
            history = torch.cat([self.pictures["end"][None], history[:, :, 1:]], dim=2)
        for turn, index in enumerate(section_order(sections, False)):
            future = history[:, :, :HISTORY]
            start = self.pictures[f"start.{index}"][None]
            known = (torch.cat([start, future[:, :, :1]], dim=2), future[:, :, 1:3], future[:, :, 3:])
            frames = self._section(index, known, inverted_layout(ahead[turn], self.window), self.window)
            history = torch.cat([frames, history], dim=2)
        made = history[:, :, : sections * self.window]
        return torch.cat([self.pictures["start.0"][None], made], dim=2)

    def forward(self) -> Tensor:
        """F1: in order of time, each section knows the start and the frames before it."""
        history = torch.cat([self._zeros(HISTORY), self.pictures["start.0"][None]], dim=2)
        for index in section_order(self.video.sections, True):
            past = history[:, :, -HISTORY:]
            start = self.pictures[f"start.{index}"][None]
            known = (torch.cat([start, past[:, :, 18:]], dim=2), past[:, :, 16:18], past[:, :, :16])
            frames = self._section(index, known, forward_layout(self.window), self.window)
            history = torch.cat([history, frames], dim=2)
        return history[:, :, HISTORY:]

    def one_frame(self) -> Tensor:
        """One picture; beside the control images everything is empty."""
        settings = self.video.one_frame
        assert settings is not None
        layout = settings.layout()
        controls = self.pictures["controls"][None]
        clean = controls if settings.no_post else torch.cat([controls, self._zeros(1)], dim=2)
        known = (clean, self._zeros(len(layout.clean_2x)), self._zeros(len(layout.clean_4x)))
        return self._section(0, known, layout, 1)

    def _zeros(self, frames: int) -> Tensor:
        return torch.zeros(1, self.size[0], frames, *self.size[2:], device=self.device)

    def _section(self, index: int, known: tuple[Tensor, Tensor, Tensor], layout: Layout, frames: int) -> Tensor:
        """Latents [1, C, frames, h, w] of one section."""
        shape = (1, self.size[0], frames, *self.size[2:])
        noise = torch.randn(shape, generator=self.generator).to(self.device)
        text = self.video.sectioned[index] if self.video.sectioned else self.prompt.prompt
        frames_known = {name: x[0] for name, x in zip(KNOWN, known, strict=True)}
        shared: Conditioning = {
            **known_frames(layout, frames_known, self.pictures[f"image.{index}"]),
            "guidance": torch.tensor(1000.0 * (self.video.guidance or 0.0)),
        }
        shared = {name: x[None].to(self.device) for name, x in shared.items()}
        told = {**shared, **self._text(text)}
        untold = {**shared, **self._text(self.prompt.negative_prompt)}
        scale = self.prompt.cfg_scale

        def velocity(x: Tensor, timestep: float) -> Tensor:
            from_timestep, factor = self.video.rope_scaling or (0.0, 1.0)
            self.denoiser.rope_scale = factor if timestep >= from_timestep else 1.0
            t = torch.tensor([timestep], device=self.device)
            positive = self.call(x, t, told)
            if scale == 1:
                return positive
            negative = self.call(x, t, untold)
            return rescaled(negative + scale * (positive - negative), positive, self.video.rescale)

        tokens = frames * self.size[-2] * self.size[-1] // TOKEN_AREA
        return sample(velocity, noise, sigmas(self.prompt.num_inference_steps, tokens, self.video.shift))

    def _text(self, text: str) -> Conditioning:
        return moved({name: x[None] for name, x in self.texts(text).items()}, self.device)


def rescaled(guided: Tensor, positive: Tensor, share: float) -> Tensor:
    """Part of the guided prediction brought back to the spread of the unguided one (arXiv 2305.08891, section 3.4)."""
    if share == 0:
        return guided
    dims = list(range(1, guided.dim()))
    back = guided * (positive.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
    return share * back + (1 - share) * guided


# --- pixels -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def decode(vae: nn.Module, latents: Tensor, prompt: ReadyPrompt, model: Model) -> Tensor:
    """Pixels [3, T, H, W] in -1..1. Sections are decoded with the next one behind them and blended where they meet."""
    video, w = _own(prompt), model.window
    if video.bulk_decode or video.sections <= 1:
        return decode_latents(vae, latents)[0]
    whole: Tensor | None = None
    for index in range(video.sections):
        part = latents[:, :, : 2 * w + 1] if index == 0 else latents[:, :, index * w + 1 : index * w + 1 + 2 * w]
        pixels = decode_latents(vae, part)[0].float().cpu()
        whole = pixels if whole is None else blended(whole, pixels, 4 * w - 3)
    assert whole is not None
    return whole


def blended(earlier: Tensor, later: Tensor, overlap: int) -> Tensor:
    """[3, T, H, W] of both, the earlier faded into the later over so many frames."""
    fade = torch.from_numpy(np.linspace(1, 0, overlap, dtype=np.float32)).view(1, -1, 1, 1).to(earlier)
    mixed = fade * earlier[:, -overlap:] + (1 - fade) * later[:, :overlap]
    return torch.cat([earlier[:, :-overlap], mixed, later[:, overlap:]], dim=1)


MADE = Made(generate, decode)
