"""`runner sample`: pictures from any of a run's weights, by the calls that training uses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from runner.atomic import new_file, write_bytes
from runner.core.events import Events
from runner.core.precision import DTYPES
from runner.core.process import prepare_torch
from runner.data.images import to_picture
from runner.execute.checkpoint import find_checkpoint, load_weights
from runner.execute.export import whole_model
from runner.families.prompts import ReadyPrompt
from runner.families.registry import family
from runner.formats.adapter_fit import some
from runner.formats.adapter_read import read_lora
from runner.inputs.sample import SampleInputs
from runner.inputs.train import TrainInputs
from runner.networks.merge import merge_into
from runner.plan.current import current_graph, trained_folder
from runner.plan.prepare import Prepared
from runner.stages.context import Context, choose_device
from runner.stages.encode import load_text_encoders
from runner.stages.modules import Trained, build, swap_blocks
from runner.stages.pictures import decode, encode_prompts, load_picture_parts, make_latents, media, png_bytes
from runner.store.run_folder import free_name, sample_stem
from runner.weights.tensors import tensor_bytes, write_hashed_tensors


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """A LoRA file to merge before sampling, how strongly, and which of its layers (regular expressions)."""

    file: Path
    multiplier: float
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    skip_unknown: bool = False
    """What the model has no place for is left out."""

    @property
    def label(self) -> str:
        return f"{self.file.name} x {self.multiplier:g}"


class Sampling:
    """Holds what is loaded; `keep_loaded` keeps the models between calls, else each has its phase and goes."""

    def __init__(
        self,
        prepared: Prepared,
        checkpoint: str,
        keep_loaded: bool,
        loras: Sequence[LoraFile] = (),
        output: str = "media",
    ) -> None:
        self.prepared, self.keep_loaded, self.output = prepared, keep_loaded, output
        self.graph = current_graph(prepared)
        self.chosen = find_checkpoint(prepared.store, self.graph, checkpoint)
        self.label = " + ".join([self.chosen.label, *(lora.label for lora in loras)])
        layers = prepared.spec.layers(prepared.model)
        self.loras = [
            read_lora(lora.file, layers, lora.multiplier, lora.include, lora.exclude, lora.skip_unknown)
            for lora in loras
        ]
        self.notes = [
            f"{given.file.name}: {len(lora.left_out)} of its layers or tensors are left out ({some(lora.left_out)})"
            for given, lora in zip(loras, self.loras, strict=True)
            if lora.left_out
        ]
        self.train = self.graph.of(TrainInputs)
        record = trained_folder(self.graph).record()
        device = choose_device(prepared.config.run.device)
        prepare_torch(prepared.config.run.deterministic, record["threads"] if record else self.graph.runtime.threads)
        bundle = family(prepared.config.model.family)
        numerics = self.train.numerics
        self.context = Context(
            family=bundle,
            store=prepared.store,
            runtime=self.graph.runtime,
            numerics=numerics,
            device=device,
            events=Events(None),
        )
        self.text_trains = bool(prepared.config.training.components.text_encoders)
        self.trained: Trained | None = None
        self.encoders: dict[str, nn.Module] | None = None
        self.vae: nn.Module | None = None
        self.parts: dict[str, nn.Module] = {}
        self.count = 0
        self.saves = False
        """The weights are wanted whole, for a file."""

    def make(self, prompts: Sequence[ReadyPrompt], folder: Path) -> Iterator[Path]:
        """Makes and writes the pictures, one prompt at a time; no file is overwritten by another picture."""
        if not prompts:
            return
        weighting = self.prepared.config.sampling.prompt_weighting
        if self.keep_loaded and not self.parts:
            self.parts = load_picture_parts(self.context)
        encoded = encode_prompts(self.context, prompts, weighting, self._text_encoders(), self.parts)
        if not self.keep_loaded:
            self.encoders = None
            self.context.free()
        latents = [make_latents(self.context, self._modules(), prompt, encoded) for prompt in prompts]
        if not self.keep_loaded:
            self.trained = None
            self.context.free()
        for prompt, latent in zip(prompts, latents, strict=True):
            stem = sample_stem(self.chosen.step, self.chosen.weights, self.chosen.label, prompt.index)
            if self.output in ("latent", "both", "latent_images"):
                yield self._write(folder / f"{stem}.latent.safetensors", self._latent_file(latent, prompt))
            if self.output != "latent":
                yield from self._media(folder, stem, latent, prompt)
            self.count += 1
        if not self.keep_loaded:
            self.vae = None

    def _media(self, folder: Path, stem: str, latent: Tensor, prompt: ReadyPrompt) -> Iterator[Path]:
        if self.vae is None and "vae" in self.parts:
            self.vae = self.parts["vae"]
        if self.vae is None:
            self.vae = self.context.load("vae")
            self.context.family.tile(self.vae, self.graph.of(SampleInputs).tile_size, self.context.runtime.sample_chunk)
        pixels = decode(self.context, self.vae, latent, prompt)
        if pixels.dim() == 4 and self.output in ("images", "latent_images"):
            for number, frame in enumerate(pixels.unbind(1)):
                picture = png_bytes(to_picture(frame), prompt, self.label)
                yield self._write(folder / stem / f"{number:04d}.png", picture)
            return
        made = media(pixels, prompt, self.label)
        path = self._write(folder / f"{stem}{'.png' if made.mp4 is None else '.mp4'}", made.mp4 or made.png)
        if made.settings is not None:
            write_bytes(path.with_suffix(".json"), made.settings)
        yield path

    def _write(self, path: Path, content: bytes) -> Path:
        """Writes a file under a name that no other content has."""
        path = free_name(path, content)
        write_bytes(path, content)
        return path

    def _latent_file(self, latent: Tensor, prompt: ReadyPrompt) -> bytes:
        settings = json.dumps({**prompt.facts(), "checkpoint": self.label}, sort_keys=True, ensure_ascii=False)
        return tensor_bytes({"latent": latent.cpu()}, {"format": "pt", "runner": settings})

    def save_merged(self, file: Path) -> None:
        """The whole model with the checkpoint and all LoRA files merged, as one file in the family's original layout."""
        self.saves = True
        modules = {**self._modules(), **self._text_encoders()}
        assert self.trained is not None
        state = {name: parameter.detach() for name, parameter in self.trained.parameters.items()}
        dtype = DTYPES[self.prepared.config.training.checkpoints.dtype]
        components = whole_model(self.context, modules, self.train, state, dtype)
        whole = self.context.family.single_file(self.prepared.model, components)
        tensors = {name: tensor.contiguous() for name, tensor in whole.items()}
        with new_file(file) as temporary:
            write_hashed_tensors(temporary, tensors, {"format": "pt", "modelspec.title": self.label})

    def _text_encoders(self) -> dict[str, nn.Module]:
        if self.encoders is None:
            trained = self._modules() if self.text_trains else {}
            self.encoders = load_text_encoders(self.context, trained)
            frozen = {name: module for name, module in self.encoders.items() if name not in trained}
            self._merge(frozen)
        return self.encoders

    def _merge(self, modules: dict[str, nn.Module]) -> None:
        for lora in self.loras:
            merge_into(modules, lora.changes)

    def _modules(self) -> dict[str, nn.Module]:
        if self.trained is None:
            self.trained = build(self.context, self.train, self.context.runtime.init_from)
            weights = load_weights(self.prepared.store, self.graph, self.chosen, self.train)
            if weights is not None:
                self.trained.assign(weights)
            self._merge(self.trained.modules)
            if not self.saves:
                swap_blocks(self.context, self.trained, self.context.runtime.sample_swap)
        return self.trained.modules
