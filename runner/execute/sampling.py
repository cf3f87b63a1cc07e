"""`runner sample`: pictures from any of a run's weights, by the calls that training uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import nn

from runner.atomic import write_bytes
from runner.config.prompts import ReadyPrompt
from runner.core.events import Events
from runner.core.process import prepare_torch
from runner.execute.checkpoint import find_checkpoint, load_weights
from runner.families.registry import family
from runner.plan.diff import current_graph
from runner.plan.prepare import Prepared
from runner.stages.context import Context, choose_device
from runner.stages.modules import Trained, build
from runner.stages.pictures import decode, encode_prompts, make_latents, png_bytes
from runner.store.run_folder import free_name, sample_stem
from runner.store.training import TrainFolder


class Sampling:
    """Holds what is loaded; `keep_loaded` keeps the models between calls, else each has its phase and goes."""

    def __init__(self, prepared: Prepared, checkpoint: str, keep_loaded: bool) -> None:
        self.prepared, self.keep_loaded = prepared, keep_loaded
        self.graph = current_graph(prepared)
        self.chosen = find_checkpoint(prepared.store, self.graph, checkpoint)
        record = TrainFolder(prepared.store.artifact("train", self.graph.fingerprint("train"))).record()
        device = choose_device(prepared.config.run.device)
        prepare_torch(prepared.config.run.deterministic, record["threads"] if record else self.graph.runtime.threads)
        bundle = family(prepared.config.model.family)
        numerics = self.graph.train.numerics
        self.context = Context(bundle, prepared.store, self.graph.runtime, numerics, device, Events(None))
        self.text_trains = bool(prepared.config.training.components.text_encoder_1)
        self.trained: Trained | None = None
        self.encoder: nn.Module | None = None
        self.vae: nn.Module | None = None
        self.count = 0

    def make(self, prompts: Sequence[ReadyPrompt], folder: Path) -> Iterator[Path]:
        """Makes and writes the pictures, one prompt at a time; no file is overwritten by another picture."""
        if not prompts:
            return
        weighting = self.prepared.config.sampling.prompt_weighting
        if self.keep_loaded and self.encoder is None and not self.text_trains:
            self.encoder = self.context.load("text_encoder_1")
        if self.text_trains:
            encoded = encode_prompts(self.context, prompts, weighting, self._modules()["text_encoder_1"])
        else:
            encoded = encode_prompts(self.context, prompts, weighting, self.encoder)
        latents = [make_latents(self.context, self._modules()["denoiser"], prompt, encoded) for prompt in prompts]
        if not self.keep_loaded:
            self.trained = None
            self.context.free()
        if self.vae is None:
            self.vae = self.context.load("vae")
        for prompt, latent in zip(prompts, latents, strict=True):
            picture = png_bytes(decode(self.context, self.vae, latent), prompt, self.chosen.label)
            stem = sample_stem(self.chosen.step, self.chosen.weights, self.chosen.label, prompt.index)
            path = free_name(folder / f"{stem}.png", picture)
            write_bytes(path, picture)
            self.count += 1
            yield path
        if not self.keep_loaded:
            self.vae = None

    def _modules(self) -> dict[str, nn.Module]:
        if self.trained is None:
            self.trained = build(self.context, self.graph.train, self.context.runtime.init_from)
            weights = load_weights(self.prepared.store, self.graph, self.chosen, self.graph.train)
            if weights is not None:
                self.trained.assign(weights)
        return self.trained.modules
