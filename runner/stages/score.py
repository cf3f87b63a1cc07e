"""Stable loss: the loss of fixed items at fixed noise levels under fixed noise, so that checkpoints differ by themselves alone.

The noise of an item at a level comes from (seed, the picture's content, the level), never from its place in a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runner.core.precision import autocast
from runner.core.task import moved
from runner.data.items import Encodings
from runner.dataset.encodings import TrainItem, evaluation_caption, still_view
from runner.inputs.cache import LatentEncoder, TextEncoder
from runner.inputs.select import SelectInputs
from runner.plan.keys import evaluation_texts, evaluation_views
from runner.records import NUMBER, sound_record, write_record
from runner.rng import normal
from runner.stages.context import Context
from runner.stages.denoising import Denoisers
from runner.stages.encode import TextEncoding
from runner.stages.encodings import Latents, Texts

LEVELS = 8
"""Noise levels, spread evenly over the timesteps."""

Score = dict[str, Any]


@dataclass(kw_only=True)
class Scorer:
    """The items to measure, encoded; `texts` is None where the text encoder trains and captions are encoded anew."""

    context: Context
    inputs: SelectInputs
    latents: Latents
    stored: Encodings
    texts: Texts | None
    stored_texts: Encodings | None

    @classmethod
    def prepare(
        cls, context: Context, inputs: SelectInputs, encoders: tuple[LatentEncoder, TextEncoder], text_trains: bool
    ) -> Scorer:
        """Encodes what is in no cache, before any denoiser is loaded."""
        items = (*inputs.held_out, *inputs.compared)
        latents, texts = Latents(context, encoders[0]), Texts(context, encoders[1])
        stored = latents.ready(evaluation_views(items))
        return cls(
            context=context,
            inputs=inputs,
            latents=latents,
            stored=stored,
            texts=None if text_trains else texts,
            stored_texts=None if text_trains else texts.ready(evaluation_texts(items, inputs.seed)),
        )

    def levels(self) -> list[int]:
        """The timesteps that are measured."""
        count = self.context.family.process(self.context.numerics).num_timesteps
        return [int((index + 0.5) * count / LEVELS) for index in range(LEVELS)]

    def score(self, step: int, weights: str, modules: dict[str, nn.Module]) -> Score:
        """Measures the model as it is now; the result is kept in the store and read from there the next time."""
        file = self.context.store.item("scores", self.inputs.score_key(step, weights))
        measured = read_score(file)
        if measured is not None:
            return measured
        encoder = None
        if self.texts is None:
            encoder = TextEncoding(self.context, "fp32", modules)
        found = {
            "step": step,
            "weights": weights,
            "levels": self.levels(),
            "held_out": self._measure(self.inputs.held_out, modules, encoder),
            "compared": self._measure(self.inputs.compared, modules, encoder),
        }
        write_record(file, found)
        self.context.store.index.add_items("scores", [(file.stem, file.stat().st_size)])
        return found

    @torch.no_grad()
    def _measure(
        self, items: Sequence[TrainItem], modules: Mapping[str, nn.Module], encoder: TextEncoding | None
    ) -> list[list[float]]:
        """[items][levels] of mean squared errors against the denoiser's own target."""
        context, numerics, seed = self.context, self.context.numerics, self.inputs.seed
        process = context.family.process(numerics).on(context.device)
        denoisers = Denoisers(context.family, context.runtime.model, modules)
        levels = self.levels()
        t = torch.tensor(levels, device=context.device)
        rows: list[list[float]] = []
        for item in items:
            view = still_view(item)
            stored = self.stored.get(self.latents.key(item.picture, view))
            stored = context.family.learned(item, view, numerics.guidance, stored)
            latent = stored["latents"].float()
            noise = torch.stack(
                [normal(tuple(latent.shape), seed, "score", *item.identity, level) for level in range(LEVELS)]
            )
            caption = evaluation_caption(item, seed)
            if encoder is not None:
                row = encoder.encode([caption])[0]
            else:
                assert self.texts is not None
                assert self.stored_texts is not None
                row = self.stored_texts.get(self.texts.key(caption))
            row = row | {name.removeprefix("cond."): x for name, x in stored.items() if name.startswith("cond.")}
            # A video is as large as many pictures: its levels are measured one by one.
            together = 1 if context.runtime.model.makes_video else LEVELS
            found: list[float] = []
            for start in range(0, LEVELS, together):
                own = slice(start, start + together)
                conditioning = {
                    name: tensor.expand(together, *tensor.shape) for name, tensor in moved(row, context.device).items()
                }
                x_0 = latent.to(context.device).expand(together, *latent.shape)
                noisy = process.noisy(x_0, noise[own].to(context.device), t[own])
                with autocast(numerics.mixed_precision, context.device):
                    prediction = denoisers(noisy.x_t, noisy.t, levels[own], conditioning)
                errors: Tensor = ((prediction.float() - noisy.target) ** 2).mean(dim=list(range(1, x_0.dim())))
                found += [float(value) for value in errors.cpu()]
            rows.append(found)
        return rows


def read_score(file: Path) -> Score | None:
    """A score that was measured before; numbers that were not finite come back as NaN. A damaged one is measured again."""
    losses = [[NUMBER]]
    return sound_record(file, {"levels": list, "held_out": losses, "compared": losses}, "it is measured again")
