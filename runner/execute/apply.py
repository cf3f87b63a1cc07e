"""Applies a plan: runs the stages in order, then brings the run's folder, the published files and the lock up to date."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from runner.atomic import remove
from runner.core.events import Events
from runner.core.process import prepare_torch
from runner.data.items import DamagedItem
from runner.errors import RunFailed, Stopped
from runner.execute.export import Exporter
from runner.execute.view import refresh_view
from runner.families.registry import family
from runner.inputs import candidates
from runner.optim.build import try_optimizer
from runner.optim.kinds import OPTIMIZERS
from runner.plan.compile import Graph
from runner.plan.diff import current_graph, dropped_pin, finished_training, known_pin
from runner.plan.history import remember
from runner.plan.keys import wanted_texts, wanted_views
from runner.plan.prepare import Prepared
from runner.plan.speed import step_key
from runner.stages.cache import encode_pictures, encode_texts, store_encodings
from runner.stages.checkpoints import Checkpoints, DamagedCheckpoint
from runner.stages.context import Context, choose_device
from runner.stages.encodings import Latents, Texts
from runner.stages.previews import Previews
from runner.stages.sample import run_sample
from runner.stages.score import Scorer
from runner.stages.select import run_select
from runner.stages.stop import StopFlag
from runner.stages.train import TrainStage
from runner.store.artifacts import read_selection
from runner.store.lock import held
from runner.store.lockfile import environment
from runner.store.run_folder import SEEDS, clear_pin, read_drawn_seeds, write_drawn_seeds
from runner.store.store import Store
from runner.store.tidy import tidy
from runner.store.training import TrainFolder

MAX_REPAIRS = 3
"""How often damaged items are encoded again before the disk is blamed."""


@dataclass
class Outcome:
    """What an apply led to."""

    graph: Graph
    selection: dict[str, Any] | None
    notes: list[str]
    environment: dict[str, str]
    published: bool


class Apply:
    """One apply of a prepared run. `until` names the last stage to run."""

    def __init__(self, prepared: Prepared, events: Events, stop: StopFlag, until: str | None, plan_text: str) -> None:
        self.prepared, self.events, self.until, self.plan_text = prepared, events, until, plan_text
        self.store: Store = prepared.store
        self.graph = current_graph(prepared)
        device = choose_device(prepared.config.run.device)
        prepare_torch(prepared.config.run.deterministic, self.graph.runtime.threads)
        optimizer = self.graph.train.optimizer
        if (
            optimizer.type not in OPTIMIZERS or optimizer.args
        ):  # what the class itself refuses, before anything is loaded
            try_optimizer(optimizer)
        self.environment = environment(_device_name(device))
        bundle = family(prepared.config.model.family)
        self.context = Context(bundle, self.store, self.graph.runtime, self.graph.train.numerics, device, events, stop)
        self.encoders = (self.graph.latents.encoder, self.graph.texts.encoder)
        self.text_trains = bool(prepared.config.training.components.text_encoders)

    def run(self) -> Outcome:
        """Raises `Stopped` with the signal's exit code, `RunFailed`, and what the libraries raise for bugs."""
        known_pin(self.prepared)
        tidy(self.store, self.prepared.output_dir)
        self._remember()
        steps: list[tuple[str, Callable[[], None]]] = [
            ("cache.latents", self._latents), ("cache.text", self._texts), ("train", self._train),
            ("sample", self._sample), ("select", self._select), ("publish", self._publish),
        ]  # fmt: skip
        self.selection: dict[str, Any] | None = None
        self.notes: list[str] = []
        for name, stage in steps:
            self._stage(name, stage)
            if name == self.until or (self.until == "cache" and name == "cache.text"):
                break
        return Outcome(self.graph, self.selection, self.notes, self.environment, name == "publish")

    def _stage(self, name: str, stage: Callable[[], None]) -> None:
        """One stage; an encoded item that turns out damaged is made again and the stage goes on from its state."""
        found: DamagedItem | DamagedCheckpoint | None = None
        for attempt in range(MAX_REPAIRS + 1):
            if self.context.stop.is_set():
                raise Stopped(f"stopped before {name}", self.context.stop.code)
            self.events.stage = name
            try:
                if found is not None:
                    self._repair(found)
                    self.events.stage = name
                stage()
                self._note_memory()
                self.context.free()
                return
            except (DamagedItem, DamagedCheckpoint) as damaged:
                if attempt == MAX_REPAIRS:
                    raise RunFailed(
                        f"files of the store are damaged again and again (the last: {damaged})",
                        hint="the disk of the store may be failing",
                    ) from None
                found = damaged

    def _repair(self, damaged: DamagedItem | DamagedCheckpoint) -> None:
        """Makes again what a stage found damaged, and all that is damaged like it."""
        if isinstance(damaged, DamagedItem):
            text = f"{damaged.kind} {damaged.key[:16]} is damaged or gone; it is encoded again"
            self.events.emit("warning", text=text)
            self._drop_damaged(damaged.kind)
        else:
            self.events.emit("warning", text=f"{damaged}; it is trained again")
            self._checkpoints().drop_damaged()
        self._latents()
        self._texts()
        if isinstance(damaged, DamagedCheckpoint):
            self._train()

    def _note_memory(self) -> None:
        """On a GPU: the most that a stage has held there, into the log."""
        if self.context.device.type == "cuda":
            import torch

            self.events.emit("memory", device_bytes=torch.cuda.max_memory_reserved(self.context.device))
            torch.cuda.reset_peak_memory_stats(self.context.device)

    def _drop_damaged(self, kind: str) -> None:
        """Takes every item whose file is not whole out of the index, so that it is encoded again."""
        from runner.data.items import read_item

        keys = self._latent_requests() if kind == "latents" else self._text_requests()
        for key in keys:
            try:
                read_item(self.store, kind, key)
            except DamagedItem:
                self.store.index.remove_item(kind, key)
                remove(self.store.item(kind, key))

    # --- stages -------------------------------------------------------------------------------------------------------

    def _pending(self) -> tuple[Any, Any]:
        """(train inputs, select inputs) where those stages still need encodings."""
        trained = finished_training(self.prepared, self.graph) is not None
        train = None if trained and self.until != "cache" else self.graph.train
        select = self.graph.select if self.graph.select.metrics else None
        chosen = read_selection(self.store, self.graph.fingerprint("select")) is not None
        return train, None if chosen and trained else select

    def _latent_requests(self) -> dict[str, Any]:
        if self.graph.runtime.latents != "disk":
            return {}
        return Latents(self.context, self.encoders[0]).requests(wanted_views(*self._pending(), self.graph.train.seed))

    def _text_requests(self) -> dict[str, str]:
        if self.graph.runtime.texts != "disk":
            return {}
        texts = Texts(self.context, self.encoders[1])
        return {texts.key(text): text for text in wanted_texts(*self._pending(), self.graph.train.seed)}

    def _latents(self) -> None:
        present = self.store.index.item_keys("latents")
        wanted = {key: request for key, request in self._latent_requests().items() if key not in present}
        if wanted:
            self.events.emit("started", total=len(wanted))
            store_encodings(
                self.context, "latents", len(wanted), encode_pictures(self.context, self.encoders[0], wanted)
            )

    def _texts(self) -> None:
        present = self.store.index.item_keys("text")
        wanted = {key: text for key, text in self._text_requests().items() if key not in present}
        if wanted:
            self.events.emit("started", total=len(wanted))
            store_encodings(self.context, "text", len(wanted), encode_texts(self.context, self.encoders[1], wanted))

    def _train(self) -> None:
        if finished_training(self.prepared, self.graph) is not None:
            return
        self._draw_seeds()
        fingerprint = self.graph.fingerprint("train")
        with held(self.store.lock_file(f"train-{fingerprint[:32]}"), "this training (another run makes the same one)"):
            self.events.emit("started", total=self.graph.train.steps)
            stage = TrainStage(
                self.context, self.graph.train, self.encoders, fingerprint,
                lambda context: Previews(context, self.graph.sample, self.text_trains),
                lambda: Scorer.prepare(self.context, self.graph.select, self.encoders, self.text_trains),
            )  # fmt: skip
            stage.run()
        if stage.seconds:
            self.store.index.put_measured(step_key(self.graph), stage.seconds)
        self.graph = current_graph(self.prepared)
        self._remember()

    def _draw_seeds(self) -> None:
        """Draws the seeds of -1, once for the run's life, and records them."""
        missing = [prompt.index for prompt in self.graph.sample.prompts if prompt.seed is None]
        if not missing:
            return
        seeds = read_drawn_seeds(self.prepared.output_dir)
        seeds |= {index: secrets.randbelow(SEEDS) for index in missing if index not in seeds}
        write_drawn_seeds(self.prepared.output_dir, seeds)
        from dataclasses import replace

        self.prepared.prompts = [
            replace(prompt, seed=seeds[prompt.index]) if prompt.seed is None else prompt
            for prompt in self.prepared.prompts
        ]
        self.graph = current_graph(self.prepared)
        self._remember()

    def _sample(self) -> None:
        self._draw_seeds()
        self.events.emit("started", total=len(self.graph.sample.prompts))
        run_sample(self.context, self.graph.sample, self.graph.train, self._checkpoints(), self.text_trains)

    def _select(self) -> None:
        fingerprint = self.graph.fingerprint("select")
        self.selection = read_selection(self.store, fingerprint)
        if self.selection is None:
            self.events.emit("started", total=len(candidates(self.graph.select.steps, self.graph.select.ema, True)))
            run_select(
                self.context, self.graph.select, self.graph.train, self.graph.sample, self.encoders, self._checkpoints(),
                self.text_trains, fingerprint,
            )  # fmt: skip
            self.selection = read_selection(self.store, fingerprint)

    def _publish(self) -> None:
        assert self.selection is not None
        trained = TrainFolder(self.store.artifact("train", self.graph.fingerprint("train")))
        exporter = Exporter(
            self.context, self.prepared, self.graph.train, self._checkpoints(), self.graph.fingerprint("train")
        )
        self.notes = refresh_view(
            self.prepared, self.graph, self.selection, trained, exporter, self.plan_text, self.environment
        )
        if dropped_pin(self.prepared, self.graph) is not None:
            clear_pin(self.prepared.output_dir)
        self._remember(complete=True)

    def _checkpoints(self) -> Checkpoints:
        folder = self.store.artifact("train", self.graph.fingerprint("train")) / "checkpoints"
        return Checkpoints(folder, self.store.index.digest)

    def _remember(self, complete: bool = False) -> None:
        """What the next plan compares with, and what gc must keep."""
        graph, seed = self.graph, self.graph.train.seed
        sample = graph.sample
        which = candidates(sample.steps, sample.ema, with_base=True)
        videos = [
            sample.key(p, *candidate)
            for candidate in which
            for p in sample.prompts
            if p.seed is not None and p.is_video
        ]
        keys = {
            "latents": [
                graph.latents.encoder.key(item.picture, view, graph.runtime.latent_batch_size)
                for item, view in wanted_views(graph.train, graph.select, seed)
            ],
            "text": [
                graph.texts.encoder.key(text, graph.runtime.text_batch_size)
                for text in wanted_texts(graph.train, graph.select, seed)
            ],
            "samples": [sample.key(p, *candidate) for candidate in which for p in sample.prompts if p.seed is not None],
            **dict.fromkeys(("videos", "settings"), videos),
            "scores": [graph.select.score_key(*candidate) for candidate in which],
        }
        record = {
            "version": 1,
            "file": self.store.portable(self.prepared.source.file),
            "output_dir": self.store.portable(self.prepared.output_dir),
            "name": self.prepared.config.run.name,
            "fingerprints": {name: node.fingerprint for name, node in graph.nodes.items()},
            "trajectory": graph.train.trajectory(),
            "steps": graph.train.steps,
            "bits": graph.runtime.bits(),
        }
        remember(self.prepared, record, keys, complete)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}, driver CUDA {torch.version.cuda}"
    return f"cpu, {torch.get_num_threads()} threads"
