"""The pictures made while training: the same as the sample stage and `runner sample` make, kept under the same keys."""

from __future__ import annotations

from torch import nn

from runner.atomic import write_bytes
from runner.inputs import SampleInputs
from runner.stages.context import Context
from runner.stages.encode import Encoding
from runner.stages.pictures import decode, encode_prompts, make_latents, png_bytes


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
        self.encoded: dict[str, Encoding] = {}
        if not text_trains and (self.every is not None or self.at_first):
            self.encoded = encode_prompts(context, self.prompts, inputs.prompt_weighting)
            context.free()

    def is_due(self, step: int) -> bool:
        return self.every is not None and step % self.every == 0

    def make(self, step: int, modules: dict[str, nn.Module], weights: str = "raw") -> int:
        """Makes what is missing for a step with the modules as they are; returns how many pictures were made."""
        store = self.context.store
        missing = [
            prompt
            for prompt in self.prompts
            if not store.item("samples", self.inputs.key(prompt, step, weights)).is_file()
        ]
        if not missing:
            return 0
        encoded = self.encoded
        if self.text_trains or not encoded:
            encoder = modules["text_encoder_1"] if self.text_trains else None
            encoded = encode_prompts(self.context, missing, self.inputs.prompt_weighting, encoder)
        latents = [make_latents(self.context, modules["denoiser"], prompt, encoded) for prompt in missing]
        vae = self.context.load("vae")
        for prompt, latent in zip(missing, latents, strict=True):
            picture = png_bytes(decode(self.context, vae, latent), prompt, label_of(step, weights))
            key = self.inputs.key(prompt, step, weights)
            write_bytes(store.item("samples", key), picture)
            store.index.add_items("samples", [(key, len(picture))])
            self.context.events.emit("sample", step=step, prompt=prompt.index, key=key, weights=weights)
        del vae
        self.context.free()
        return len(missing)
