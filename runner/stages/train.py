"""train: runs the loop on the planned items, with checkpoints, states, samples and the log around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from runner import __version__
from runner.atomic import fsync_tree, link_or_copy_tree, make_folder, remove, rename, sweep, writing
from runner.core.fit import Hooks, Loop, Stop, fit
from runner.core.precision import scaler
from runner.core.process import prepare_torch
from runner.core.state import State, load_newest, save_state, state_folders
from runner.core.writer import Writer
from runner.dataset.buckets import View
from runner.dataset.encodings import TrainItem
from runner.errors import RunFailed, Stopped
from runner.inputs.cache import LatentEncoder, TextEncoder
from runner.inputs.sample import SampleInputs
from runner.inputs.select import SelectInputs
from runner.inputs.train import TrainInputs
from runner.optim.build import build_optimizer, parameter_groups
from runner.optim.schedules import schedule
from runner.optim.single import SingleOptions
from runner.plan.current import finished_training
from runner.plan.keys import training_texts, training_views
from runner.plan.resolve import checkpoint_steps
from runner.plan.speed import step_key
from runner.records import write_record
from runner.stages.checkpoints import Checkpoints
from runner.stages.context import Context
from runner.stages.encode import LatentEncoding, load_text_encoders
from runner.stages.encodings import Latents, Texts
from runner.stages.job import Job
from runner.stages.loader import Sources, StepLoader
from runner.stages.modules import Trained, build_swapped, learning_rates
from runner.stages.previews import Previews
from runner.stages.score import Scorer
from runner.stages.task import DiffusionTask
from runner.store.lock import held
from runner.store.training import MANIFEST, MANIFEST_VERSION, RECORD, TrainFolder, longest_of, named_steps

LARGE = 2**28
"""Bytes of weights that are worth no copy where it would be made of the same memory."""


class TrainStage:
    """One run of the train stage in its workspace; `run` returns the finished artifact's folder."""

    def __init__(
        self,
        context: Context,
        inputs: TrainInputs,
        encoders: tuple[LatentEncoder, TextEncoder],
        fingerprint: str,
        make_previews: Callable[[Context], Previews],
        make_scorer: Callable[[], Scorer],
    ) -> None:
        self.context, self.inputs, self.encoders = context, inputs, encoders
        self.workspace = context.store.workspace("train", fingerprint)
        self.artifact = context.store.artifact("train", fingerprint)
        self.checkpoints = Checkpoints(self.workspace / "checkpoints", context.store.index.digest)
        self.make_previews, self.make_scorer = make_previews, make_scorer
        self.scorer: Scorer | None = None
        self.record: dict[str, Any] = {}
        """What the workspace knows of the training: trajectory, threads, bits."""
        self.redo: tuple[State | None, list[int]] | None = None
        """Checkpoints that are gone, and the state to make them again from, on the way to the state that is there."""
        self.trained: Trained
        self.ema: EMAModel | None = None
        self.seconds = 0.0
        self.writer = Writer()

    @property
    def states(self) -> Path:
        return self.workspace / "states"

    def run(self) -> Path:
        """Trains from the newest valid state, or from the start."""
        context, runtime, inputs = self.context, self.context.runtime, self.inputs
        start = self._open_workspace()
        if runtime.keep is not None:
            self.scorer = self.make_scorer()
        previews = self.make_previews(context)
        if previews.every is not None or previews.at_first:
            previews.encode()
        sources, latents = self._sources()
        loader = StepLoader(inputs, sources, runtime.workers, device=context.device)
        self.trained = build_swapped(context, inputs)
        encoders = load_text_encoders(context, self.trained.modules) if sources.texts is None else None
        task = DiffusionTask(context, inputs, self.trained, loader, latents, encoders)
        ratio = inputs.adapter.lora_plus_ratio if inputs.adapter is not None else 1.0
        groups = parameter_groups(
            self.trained.parameters, learning_rates(inputs, runtime.model), ratio, inputs.optimizer.type == "muon"
        )
        per_tensor = inputs.max_grad_norm if inputs.clip_grad == "per_tensor" else 0.0
        options = SingleOptions(
            runtime.fused_backward, runtime.optimizer_offload, inputs.optimizer.stochastic_rounding, per_tensor
        )
        optimizer = build_optimizer(inputs.optimizer, groups, options)
        if inputs.ema is not None:
            self.ema = EMAModel(list(self.trained.parameters.values()), decay=inputs.ema.decay, foreach=True)
            self.ema.to(device=context.device)
        clipped = 0.0 if per_tensor and options.needed else inputs.max_grad_norm
        loop = Loop(
            steps=inputs.steps,
            seed=inputs.seed,
            max_grad_norm=clipped,
            clip_grad=inputs.clip_grad,
            log_every=runtime.log_every,
            factor=schedule(inputs.scheduler, inputs.steps, inputs.learning_rate),
            ema=self.ema,
            ema_every=inputs.ema.update_every if inputs.ema else 1,
        )
        if start is None and previews.at_first:
            previews.make(0, self.trained.modules)
        try:
            if self.redo is not None:
                first, gaps = self.redo
                self._fit(task, optimizer, replace(loop, steps=gaps[-1]), previews, first, gaps)
            final = self._fit(task, optimizer, loop, previews, start)
        finally:
            self.writer.close()
        return self._finish(final)

    # --- workspace ----------------------------------------------------------------------------------------------------

    def _open_workspace(self) -> State | None:
        self._reopen()
        make_folder(self.workspace)
        sweep(self.workspace)
        sweep(self.checkpoints.folder)
        folder, bits = TrainFolder(self.workspace), self.context.runtime.bits()
        record = folder.record()
        begun = (self.workspace / RECORD).exists() and folder.newest_step() is not None
        if record is None and not begun:  # a kill while another training's states were taken over leaves no record
            self._adopt()
            record = folder.record()
        if record is not None:
            prepare_torch(self.context.runtime.deterministic, record["threads"])
            for key, old in record["bits"].items():
                if bits.get(key) != old:
                    self._warn(f"{key} was {old}: bytes differ from an undisturbed run")
        self.record = {"trajectory": self.inputs.trajectory(), "threads": torch.get_num_threads(), "bits": bits}
        write_record(self.workspace / RECORD, self.record)
        start, damaged = load_newest(self.states, self.inputs.steps)
        for state in damaged:
            self._warn(f"state {state.folder.name} is damaged and skipped: {state.reason}")
        self._find_gaps(folder, start.step if start is not None else 0)
        return start

    def _warn(self, text: str) -> None:
        self.context.events.emit("warning", text=text)

    def _reopen(self) -> None:
        """A finished training that lacks its record or a checkpoint becomes one in progress again, at its last state."""
        if not self.artifact.exists():
            return
        finished, begun = TrainFolder(self.artifact), TrainFolder(self.workspace)
        if self.workspace.exists() and (begun.newest_step() or 0) > (finished.newest_step() or 0):
            remove(self.artifact)
            return
        remove(self.workspace)
        rename(self.artifact, self.workspace)
        self.checkpoints.drop_damaged()
        self._warn("the finished training is damaged; it goes on from its last state")

    def _find_gaps(self, folder: TrainFolder, step: int) -> None:
        """Plans the checkpoints before `step` that are gone or were damaged. That of the step itself needs its state only."""
        runtime = self.context.runtime
        planned = checkpoint_steps(self.inputs.steps, runtime.checkpoint_every)
        gaps = [gap for gap in folder.gaps(planned, runtime.keep) if gap < step]
        if gaps:
            first, _ = load_newest(self.states, gaps[0])
            self.redo = first, gaps
            self._warn(f"gone or damaged: {named_steps(gaps)}; trained again up to step {gaps[-1]}")
        elif runtime.keep is not None:  # what is kept depends on what there is
            for later in self.checkpoints.steps():
                if later > step:
                    remove(self.checkpoints.path(later).parent)

    def _adopt(self) -> None:
        """Starts from the longest run of the same trajectory: a finished one, or one in progress for another length."""
        if self.inputs.has_horizon:
            return
        store = self.context.store
        others = [*store.artifacts("train"), *(f for f in store.workspaces("train") if f != self.workspace)]
        best = longest_of([TrainFolder(folder) for folder in others], self.inputs.trajectory(), self.inputs.steps)
        if best is None:
            return
        for part in ("states", "checkpoints"):
            if (best[1].path / part).is_dir():
                link_or_copy_tree(best[1].path / part, self.workspace / part)
        record = best[1].record()
        assert record is not None
        write_record(self.workspace / RECORD, {name: record[name] for name in ("trajectory", "threads", "bits")})

    # --- training -----------------------------------------------------------------------------------------------------

    def _sources(self) -> tuple[Sources, LatentEncoding | None]:
        """Encodings for the loader; what is kept in memory is encoded here, before the denoiser is loaded."""
        context, inputs, model = self.context, self.inputs, self.context.runtime.model
        latents, texts = Latents(context, self.encoders[0]), Texts(context, self.encoders[1])
        live = LatentEncoding(context, self.encoders[0]) if not inputs.latents_cached else None
        held_latents = latents.ready(training_views(inputs.items, inputs.seed)) if inputs.latents_cached else None
        held_texts = texts.ready(training_texts(inputs.items, inputs.seed)) if inputs.texts_cached else None

        discrete = context.family.process(context.numerics).prediction_type != "flow"

        def shape(item: TrainItem) -> tuple[int, ...]:
            return model.latent_shape(item.fit.bucket, item.latent_frames(model.frame_factor))

        def learned(item: TrainItem, view: View, encoding: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return context.family.learned(item, view, inputs.numerics.guidance, encoding)

        points = context.family.spec.shift_points
        return Sources(
            latents=held_latents,
            latent_key=latents.key,
            latent_shape=shape,
            texts=held_texts,
            text_key=texts.key,
            learned=learned,
            discrete=discrete,
            shift_points=points,
        ), live

    def _fit(
        self,
        task: DiffusionTask,
        optimizer: torch.optim.Optimizer,
        loop: Loop,
        previews: Previews,
        start: State | None,
        only: Sequence[int] | None = None,
    ) -> State:
        """Trains from a state to the loop's end; `only`: no checkpoints but these, none of which is dropped again."""
        context, runtime = self.context, self.context.runtime
        saved = set(checkpoint_steps(self.inputs.steps, runtime.checkpoint_every) if only is None else only)
        began = time.monotonic()
        if start is not None:
            context.events.emit("resumed", step=start.step, total=self.inputs.steps)

        def is_due(step: int) -> bool:
            return step in saved or step % runtime.state_every == 0 or previews.is_due(step)

        def after(step: int, state: Callable[[], State]) -> None:
            if step in saved:
                self._checkpoint(step, prune=only is None)
            if previews.is_due(step):
                previews.make(step, self.trained.modules)
            if step % runtime.state_every == 0 and step < self.inputs.steps:
                if self.writer.step != step:
                    self.writer.wait()  # a resume from this state would not make an older checkpoint
                save_state(self.states, state())
                context.events.emit("state", step=step)

        def log(step: int, line: dict[str, float]) -> None:
            context.events.emit("step", step=step, total=self.inputs.steps, **line)

        def resumed(step: int) -> None:
            if step in saved and not self.checkpoints.path(step).exists():  # killed while it was written
                self._checkpoint(step, prune=only is None)

        hooks = Hooks(
            is_due=is_due,
            after=after,
            log=log,
            stop_requested=context.stop.is_set,
            last_checkpoint=lambda: self.checkpoints.newest_name(),
            resumed=resumed,
        )
        precision = scaler(self.inputs.numerics.mixed_precision, context.device)
        try:
            final = fit(task, optimizer, precision, loop, hooks, start)
        except Stop as stop:
            self.writer.wait()
            save_state(self.states, stop.state)
            message = (
                f"stopped after step {stop.state.step} of {self.inputs.steps}; the state is saved, apply again to go on"
            )
            raise Stopped(message, context.stop.code) from None
        except torch.OutOfMemoryError as error:
            raise RunFailed(
                f"out of memory on {context.device}: {str(error).splitlines()[0]}",
                hint="training.memory.gradient_checkpointing = true, a smaller dataset.batch_size or resolution",
            ) from None
        self.writer.wait()
        steps = final.step - (start.step if start else 0)
        if steps:
            self.seconds = (time.monotonic() - began) / steps
        return final

    def _checkpoint(self, step: int, prune: bool = True) -> None:
        """Copies the weights and writes them while training goes on; large ones of a CPU are written at once, uncopied."""
        weights = {"raw": {name: parameter.detach() for name, parameter in self.trained.parameters.items()}}
        if self.ema is not None:
            weights["ema"] = dict(zip(self.trained.parameters, self.ema.shadow_params, strict=True))
        size = sum(tensor.nbytes for group in weights.values() for tensor in group.values())
        if self.context.device.type == "cpu" and size > LARGE:
            self.checkpoints.save(step, weights)
        else:
            copies = {
                name: {key: tensor.to("cpu", copy=True) for key, tensor in group.items()}
                for name, group in weights.items()
            }
            self.writer.submit(step, lambda: self.checkpoints.save(step, copies))
        self.context.events.emit("checkpoint", step=step)
        keep = self.context.runtime.keep
        if keep is None or not prune:
            return
        self.writer.wait()
        assert self.scorer is not None
        self.scorer.score(step, "raw", self.trained.modules)
        self.checkpoints.prune(keep, lambda other: self._loss_at(other))

    def _loss_at(self, step: int) -> float:
        assert self.scorer is not None
        score = self.scorer.score(step, "raw", self.trained.modules)
        rows = score["held_out"] or score["compared"]
        return sum(sum(row) for row in rows) / max(1, sum(len(row) for row in rows))

    def _finish(self, final: State) -> Path:
        """Makes the workspace the artifact, by one rename: the final state, the checkpoints and the manifest."""
        save_state(self.states, final)
        for folder in state_folders(self.states)[:-1]:
            remove(folder)
        before = TrainFolder(self.workspace).finished_record() or {}
        manifest: dict[str, Any] = {
            "version": MANIFEST_VERSION,
            "runner": __version__,
            **self.record,
            "steps": self.inputs.steps,
            "checkpoints": self.checkpoints.steps(),
            "weights": ["raw", "ema"] if self.ema is not None else ["raw"],
            "history": final.counters["history"],
            "seconds_per_step": self.seconds or before.get("seconds_per_step", 0.0),
        }
        write_record(self.workspace / MANIFEST, manifest)
        with writing(self.workspace):
            fsync_tree(self.workspace)
        rename(self.workspace, self.artifact)
        return self.artifact


def run(job: Job, inputs: TrainInputs) -> None:
    """Trains, where it is not done already."""
    if finished_training(job.graph) is not None:
        return
    job.draw_seeds()
    context, node = job.context, job.graph.node(TrainInputs)
    sample, select = job.graph.of(SampleInputs), job.graph.of(SelectInputs)
    encoders, text_trains = (inputs.latent_encoder, inputs.text_encoder), bool(inputs.components.text_encoders)
    lock = context.store.lock_file(f"{node.name}-{node.fingerprint[:32]}")
    with held(lock, "this training (another run makes the same one)"):
        context.events.emit("started", total=inputs.steps)
        stage = TrainStage(
            context,
            inputs,
            encoders,
            node.fingerprint,
            lambda context: Previews(context, sample, text_trains),
            lambda: Scorer.prepare(context, select, encoders, text_trains),
        )
        stage.run()
    if stage.seconds:
        context.store.index.put_measured(step_key(job.graph), stage.seconds)
    job.again()
