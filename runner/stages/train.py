"""train: runs the loop on the planned items, with checkpoints, states, samples and the log around it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel

from runner import __version__
from runner.atomic import fsync_folder, fsync_tree, link_or_copy_tree, sweep, write_json
from runner.core.fit import Hooks, Loop, Stop, fit
from runner.core.precision import scaler
from runner.core.process import prepare_torch
from runner.core.state import State, load_newest, save_state
from runner.core.writer import Writer
from runner.data.loader import Sources, StepLoader
from runner.dataset.encodings import TrainItem
from runner.errors import RunFailed, Stopped
from runner.inputs import LatentEncoder, TextEncoder, TrainInputs
from runner.optim.build import build_optimizer, parameter_groups
from runner.optim.schedules import schedule
from runner.optim.single import SingleOptions
from runner.plan.keys import training_texts, training_views
from runner.plan.resolve import checkpoint_steps
from runner.stages.checkpoints import Checkpoints
from runner.stages.context import Context
from runner.stages.encode import LatentEncoding, load_text_encoders
from runner.stages.encodings import Latents, Texts
from runner.stages.modules import Trained, build_swapped, learning_rates
from runner.stages.previews import Previews
from runner.stages.score import Scorer
from runner.stages.task import DiffusionTask
from runner.store.training import MANIFEST, MANIFEST_VERSION, RECORD, TrainFolder, longest_of

LARGE = 2**28
"""Bytes of weights that are worth no copy where it would be made of the same memory."""


class TrainStage:
    """One run of the train stage in its workspace; `run` returns the finished artifact's folder."""

    def __init__(
        self, context: Context, inputs: TrainInputs, encoders: tuple[LatentEncoder, TextEncoder], fingerprint: str,
        make_previews: Callable[[Context], Previews], make_scorer: Callable[[], Scorer],
    ) -> None:  # fmt: skip
        self.context, self.inputs, self.encoders = context, inputs, encoders
        self.workspace = context.store.workspace("train", fingerprint)
        self.artifact = context.store.artifact("train", fingerprint)
        self.checkpoints = Checkpoints(self.workspace / "checkpoints")
        self.make_previews, self.make_scorer = make_previews, make_scorer
        self.scorer: Scorer | None = None
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
        loader = StepLoader(inputs, sources, runtime.workers)
        self.trained = build_swapped(context, inputs)
        encoders = load_text_encoders(context, self.trained.modules) if sources.texts is None else None
        task = DiffusionTask(context, inputs, self.trained, loader, latents, encoders)
        ratio = inputs.adapter.lora_plus_ratio if inputs.adapter is not None else 1.0
        groups = parameter_groups(
            self.trained.parameters, learning_rates(inputs), ratio, inputs.optimizer.type == "muon"
        )
        per_tensor = inputs.max_grad_norm if inputs.clip_grad == "per_tensor" else 0.0
        options = SingleOptions(runtime.fused_backward, runtime.optimizer_offload, inputs.optimizer.stochastic_rounding, per_tensor)  # fmt: skip
        optimizer = build_optimizer(inputs.optimizer, groups, options)
        if inputs.ema is not None:
            self.ema = EMAModel(list(self.trained.parameters.values()), decay=inputs.ema.decay, foreach=True)
            self.ema.to(device=context.device)
        clipped = 0.0 if per_tensor and options.needed else inputs.max_grad_norm
        loop = Loop(
            inputs.steps, inputs.seed, clipped, inputs.clip_grad, runtime.log_every,
            schedule(inputs.scheduler, inputs.steps, inputs.learning_rate), self.ema,
            inputs.ema.update_every if inputs.ema else 1,
        )  # fmt: skip
        if start is None and previews.at_first:
            previews.make(0, self.trained.modules)
        final = self._fit(task, optimizer, loop, previews, start)
        return self._finish(final)

    # --- workspace ----------------------------------------------------------------------------------------------------

    def _open_workspace(self) -> State | None:
        self.workspace.mkdir(parents=True, exist_ok=True)
        sweep(self.workspace)
        sweep(self.checkpoints.folder)
        record_file = self.workspace / RECORD
        bits = self.context.runtime.bits()
        if not record_file.exists():
            self._adopt()
        if record_file.exists():
            record = json.loads(record_file.read_text(encoding="utf-8"))
            prepare_torch(self.context.runtime.deterministic, record["threads"])
            for key, old in record["bits"].items():
                if bits.get(key) != old:
                    self.context.events.emit("warning", text=f"{key} was {old}: bytes differ from an undisturbed run")
        threads = torch.get_num_threads()
        write_json(record_file, {"trajectory": self.inputs.trajectory(), "threads": threads, "bits": bits})
        start, damaged = load_newest(self.states, self.inputs.steps)
        for state in damaged:
            self.context.events.emit(
                "warning", text=f"state {state.folder.name} is damaged and skipped: {state.reason}"
            )
        if start is not None:
            self.context.events.emit("resumed", step=start.step, total=self.inputs.steps)
        return start

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
        write_json(self.workspace / RECORD, {name: record[name] for name in ("trajectory", "threads", "bits")})

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

        sizes, cut = context.family.size_conditioning, context.family.cut
        return Sources(held_latents, latents.key, shape, held_texts, texts.key, sizes, discrete, cut), live

    def _fit(
        self, task: DiffusionTask, optimizer: torch.optim.Optimizer, loop: Loop, previews: Previews, start: State | None
    ) -> State:
        context, runtime = self.context, self.context.runtime
        saved = set(checkpoint_steps(self.inputs.steps, runtime.checkpoint_every))
        began = time.monotonic()

        def is_due(step: int) -> bool:
            return step in saved or step % runtime.state_every == 0 or previews.is_due(step)

        def after(step: int, state: Callable[[], State]) -> None:
            if step in saved:
                self._checkpoint(step)
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
                self._checkpoint(step)

        hooks = Hooks(is_due, after, log, context.stop.is_set, lambda: self.checkpoints.newest_name(), resumed)
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
        finally:
            self.writer.close()
        steps = final.step - (start.step if start else 0)
        self.seconds = (time.monotonic() - began) / max(steps, 1)
        return final

    def _checkpoint(self, step: int) -> None:
        """Copies the weights and writes them while training goes on; large ones of a CPU are written at once, uncopied."""
        weights = {"raw": {name: parameter.detach() for name, parameter in self.trained.parameters.items()}}
        if self.ema is not None:
            weights["ema"] = dict(zip(self.trained.parameters, self.ema.shadow_params, strict=True))
        size = sum(tensor.nbytes for group in weights.values() for tensor in group.values())
        if self.context.device.type == "cpu" and size > LARGE:
            self.checkpoints.save(step, weights)
        else:
            copies = {name: {key: tensor.to("cpu", copy=True) for key, tensor in group.items()} for name, group in weights.items()}  # fmt: skip
            self.writer.submit(step, lambda: self.checkpoints.save(step, copies))
        self.context.events.emit("checkpoint", step=step)
        keep = self.context.runtime.keep
        if keep is None:
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
        for folder in sorted(self.states.iterdir())[:-1]:
            shutil.rmtree(folder)
        record = json.loads((self.workspace / RECORD).read_text(encoding="utf-8"))
        manifest: dict[str, Any] = {
            "version": MANIFEST_VERSION, "runner": __version__, **record, "steps": self.inputs.steps,
            "checkpoints": self.checkpoints.steps(), "weights": ["raw", "ema"] if self.ema is not None else ["raw"],
            "history": final.counters["history"], "seconds_per_step": self.seconds,
        }  # fmt: skip
        write_json(self.workspace / MANIFEST, manifest)
        fsync_tree(self.workspace)
        self.artifact.parent.mkdir(parents=True, exist_ok=True)
        self.workspace.rename(self.artifact)
        fsync_folder(self.artifact.parent)
        return self.artifact
