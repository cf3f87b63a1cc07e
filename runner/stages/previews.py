"""The pictures made while training: the same as the sample stage and `runner sample` make, kept under the same keys."""

from __future__ import annotations

import psutil
from torch import nn

from runner.atomic import write_bytes
from runner.families.prompts import ReadyPrompt
from runner.inputs.sample import SampleInputs
from runner.stages.context import Context
from runner.stages.pictures import Encoded, decode, encode_prompts, make_latents, media
from runner.store.run_folder import show_sample
from runner.store.samples import is_sound

ROOMY = 8
"""How many times an autoencoder's bytes the host must have free, for it to stay loaded between pictures."""


def label_of(step: int, weights: str) -> str:
    """`base`, `step 50` or `step 50 ema`."""
    if step == 0:
        return "base"
    return f"step {step}" if weights == "raw" else f"step {step} {weights}"


class Previews:
    """Makes the prompts' pictures at the due steps. Prompts are encoded once, before the denoiser is loaded."""

    def __init__(self, context: Context, inputs: SampleInputs, text_trains: bool) -> None:
        self.context, self.inputs, self.text_trains = context, inputs, text_trains
        self.prompts = [prompt for prompt in inputs.prompts if prompt.seed is not None]
        self.every = context.runtime.sample_every if self.prompts else None
        self.at_first = bool(self.prompts) and context.runtime.sample_at_first
        self.encoded = Encoded()
        self.vae: nn.Module | None = None
        """The autoencoder, where it stays loaded."""
        self.sound: set[str] = set()
        """Keys of pictures that are there and were looked at."""

    def encode(self) -> None:
        """Encodes the prompts and lets the text encoder go again; nothing to do where it trains."""
        if not self.text_trains:
            self.encoded = encode_prompts(self.context, self.prompts, self.inputs.prompt_weighting)
            self.context.free()

    def is_due(self, step: int) -> bool:
        return self.every is not None and step % self.every == 0

    def make(self, step: int, modules: dict[str, nn.Module], weights: str = "raw") -> int:
        """Makes what is missing for a step with the modules as they are; returns how many pictures were made."""
        store = self.context.store
        missing = self.missing(step, weights)
        if not missing:
            return 0
        encoded = self.encoded
        if self.text_trains:
            encoded = encode_prompts(self.context, missing, self.inputs.prompt_weighting, modules)
        latents = [make_latents(self.context, modules, prompt, encoded) for prompt in missing]
        vae = self._autoencoder()
        for prompt, latent in zip(missing, latents, strict=True):
            made = media(decode(self.context, vae, latent, prompt), prompt, label_of(step, weights))
            key = self.inputs.key(prompt, step, weights)
            if made.mp4 is not None and made.settings is not None:  # before the picture, which says that all is there
                write_bytes(store.item("videos", key), made.mp4)
                write_bytes(store.item("settings", key), made.settings)
                store.index.add_items("videos", [(key, len(made.mp4))])
                store.index.add_items("settings", [(key, len(made.settings))])
            write_bytes(store.item("samples", key), made.png)
            store.index.add_items("samples", [(key, len(made.png))])
            show_sample(store, key, self.context.runtime.output_dir, step, weights, prompt)
            self.context.events.emit("sample", step=step, prompt=prompt.index, key=key, weights=weights)
        del vae
        self._put_away()
        return len(missing)

    def _autoencoder(self) -> nn.Module:
        if self.vae is None:
            self.vae = self.context.load("vae")
            self.context.family.tile(self.vae, self.inputs.tile_size, self.context.runtime.sample_chunk)
        return self.vae.to(self.context.device)

    def _put_away(self) -> None:
        """Between pictures the autoencoder waits on the host where there is room, and is loaded again where there is not:
        the device has what training needs."""
        assert self.vae is not None
        size = sum(tensor.nbytes for tensor in self.vae.state_dict().values())
        self.vae = self.vae.to("cpu") if psutil.virtual_memory().available > ROOMY * size else None
        self.context.free()

    def missing(self, step: int, weights: str) -> list[ReadyPrompt]:
        """The prompts that have no picture of these weights yet."""
        store = self.context.store
        keys = {p.index: self.inputs.key(p, step, weights) for p in self.prompts}
        self.sound |= {
            keys[p.index] for p in self.prompts if keys[p.index] not in self.sound and is_sound(store, keys[p.index], p)
        }
        return [p for p in self.prompts if keys[p.index] not in self.sound]
