"""train: the steps of the loop, its checkpoints and its states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from runner.config.optimizer_kinds import state_bytes
from runner.inputs.train import TRAIN_VERSION, AdapterSettings, TrainInputs
from runner.networks.shapes import count_parameters
from runner.plan.compile import Graph, Run
from runner.plan.current import finished_training, trained_folder
from runner.plan.diff import Plan, Planning
from runner.plan.keys import training_texts, training_views
from runner.plan.prepare import Prepared
from runner.plan.resolve import checkpoint_steps
from runner.plan.stage import Action, Reads, Stage, Told
from runner.plan.stages.cache import LATENTS, TEXTS
from runner.store.training import TrainFolder, longest_of, named_steps


class Train(Stage[TrainInputs]):
    """The training."""

    name = "train"
    version = TRAIN_VERSION
    follows: ClassVar[tuple[str, ...]] = (LATENTS.name, TEXTS.name)
    address = "runner.stages.train:run"
    again = "training starts anew"
    locked = True
    makes: ClassVar[tuple[str, ...]] = ("checkpoint",)

    def inputs(self, run: Run) -> TrainInputs:
        prepared, config, training = run.prepared, run.config, run.config.training
        network = config.network
        used = [
            *prepared.model.denoising,
            *(name for name in prepared.model.text_encoders if getattr(training.components, name)),
        ]
        return TrainInputs(
            numerics=run.numerics,
            seed=config.run.seed,
            steps=prepared.length.steps,
            weights={name: prepared.weights[name] for name in used},
            from_scratch=config.model.from_scratch,
            latent_encoder=run.latent_encoder,
            text_encoder=run.text_encoder,
            components=training.components,
            targets=tuple(prepared.targets) if network is not None else None,
            adapter=AdapterSettings(
                dropout=network.dropout,
                rank_dropout=network.rank_dropout,
                module_dropout=network.module_dropout,
                decompose_factor=network.decompose_factor,
                lora_plus_ratio=network.lora_plus_ratio,
                scale_weight_norms=network.scale_weight_norms,
            )
            if network is not None
            else None,
            base_weights=prepared.merged_first,
            init_from=prepared.weights["init_from"],
            learning_rate=training.learning_rate,
            accumulation=training.gradient_accumulation_steps,
            max_grad_norm=training.max_grad_norm,
            clip_grad=training.clip_grad,
            optimizer=training.optimizer,
            scheduler=training.scheduler,
            loss=training.loss,
            timesteps=training.timesteps,
            ema=training.ema,
            items=tuple(prepared.collection.items),
            item_facts=run.item_facts,
            groups=tuple(prepared.collection.groups),
            cycle=prepared.collection.cycle,
            latents_cached=config.caching.latents != "off",
            texts_cached=config.caching.text != "off",
        )

    def pending(self, inputs: TrainInputs, planning: Planning) -> Action:
        graph, store, steps = planning.graph, planning.store, inputs.steps
        fingerprint = graph.fingerprint(self.name)
        if finished_training(graph) is not None:
            return Action(node=self.name, symbol="=", summary=f"{steps} steps are trained", total=steps)
        damaged = trained_folder(graph)
        if damaged.newest_step():
            return self._mending(damaged, inputs, planning)
        workspace = TrainFolder(store.workspace(self.name, fingerprint))
        if workspace.record() is not None:
            done = min(workspace.newest_step() or 0, steps)
            summary = f"continue from step {done} of {steps}" if done else f"start again: {steps} steps"
            return Action(
                node=self.name,
                symbol="~",
                summary=summary,
                reasons=["stopped before its end"],
                total=steps,
                missing=steps - done,
            )
        if not inputs.has_horizon:
            others = [TrainFolder(folder) for folder in (*store.artifacts(self.name), *store.workspaces(self.name))]
            longest = longest_of(others, inputs.trajectory(), steps)
            if longest is not None and longest[0] > 0:
                old = planning.applied.record.get("steps") if planning.applied else None
                reason = (
                    f"training.max_train_steps {old} → {steps}" if old and old != steps else "a shorter run is there"
                )
                return Action(
                    node=self.name,
                    symbol="~",
                    summary=f"extend {longest[0]} → {steps} steps",
                    reasons=[reason],
                    total=steps,
                    missing=steps - longest[0],
                )
        reasons = self._reasons(inputs, planning)
        old_steps = self._work_thrown_away(planning)
        if old_steps:
            old = f"{old_steps} trained steps of run {planning.prepared.config.run.name!r}"
            return Action(
                node=self.name,
                symbol="-/+",
                summary=f"train {steps} steps anew",
                reasons=reasons,
                total=steps,
                missing=steps,
                throws_away=old,
            )
        return Action(
            node=self.name, symbol="+", summary=f"train {steps} steps", reasons=reasons, total=steps, missing=steps
        )

    def _mending(self, folder: TrainFolder, inputs: TrainInputs, planning: Planning) -> Action:
        """What a finished training needs whose record or whose checkpoints are damaged."""
        steps, runtime = inputs.steps, planning.graph.runtime
        done = min(folder.newest_step() or 0, steps)
        planned = checkpoint_steps(steps, runtime.checkpoint_every)
        lacking = {*folder.gaps(planned, runtime.keep), *folder.damaged_steps(planning.store.index.known_digest)}
        gaps = sorted(gap for gap in lacking if gap < done)
        again = gaps[-1] if gaps else 0
        summary = f"finish again from step {done} of {steps}"
        if gaps:
            summary = f"make {named_steps(gaps)} again: {again} steps"
        return Action(
            node=self.name,
            symbol="~",
            summary=summary,
            reasons=["its record or a checkpoint is gone or damaged"],
            total=steps,
            missing=again + steps - done,
        )

    def _reasons(self, inputs: TrainInputs, planning: Planning) -> list[str]:
        reasons = planning.reasons(self.name)
        if reasons and inputs.has_horizon and all(reason.startswith("training.max_train") for reason in reasons):
            reasons.append(f'the schedule "{inputs.scheduler.type}" depends on the length')
        return reasons

    def _work_thrown_away(self, planning: Planning) -> int:
        """Steps that the run's last apply has trained under another fingerprint."""
        old = planning.applied.fingerprint(self.name) if planning.applied is not None else None
        if old is None or old == planning.graph.fingerprint(self.name):
            return 0
        for path in (planning.store.artifact(self.name, old), planning.store.workspace(self.name, old)):
            step = TrainFolder(path).newest_step()
            if step:
                return step
        return 0

    def reads(self, inputs: TrainInputs) -> Reads:
        views = training_views(inputs.items, inputs.seed) if inputs.latents_cached else []
        texts = list(dict.fromkeys(training_texts(inputs.items, inputs.seed))) if inputs.texts_cached else []
        return Reads(views, texts)

    def disk(self, inputs: TrainInputs, plan: Plan) -> Mapping[str, int]:
        if not plan.actions[self.name].pending:
            return {}
        trainable, runtime = trained_numbers(plan.prepared)[0], plan.graph.runtime
        kinds = 2 if inputs.ema is not None else 1
        count = len(checkpoint_steps(inputs.steps, runtime.checkpoint_every))
        kept = count if runtime.keep is None else min(count, runtime.keep + 1)
        number = 2 if inputs.optimizer.stochastic_rounding else 4
        state = number + state_bytes(inputs.optimizer.type) + (4 if kinds == 2 else 0)
        return {"checkpoints": kept * kinds * trainable * number, "state": int(trainable * state)}

    def told(self, inputs: TrainInputs, graph: Graph) -> Told:
        prepared, record = graph.prepared, trained_folder(graph).finished_record()
        held_out = len(prepared.collection.held_out)
        cards = [
            ("steps", f"{inputs.steps:,}"),
            ("items", f"{len(inputs.items):,} + {held_out} held out"),
            ("trained", kind_of(prepared)),
            ("base model", prepared.model.label),
        ]
        if record is not None:
            cards.append(("seconds a step", f"{record['seconds_per_step']:.3f}"))
        return Told(cards)


def trained_numbers(prepared: Prepared) -> tuple[int, int]:
    """(trainable parameters, layers with adapters or 0)."""
    if prepared.config.network is not None:
        return count_parameters(prepared.targets, prepared.config.network.decompose_factor), len(prepared.targets)
    model = prepared.model
    return sum(model.components[name].parameters for name in model.rates(prepared.config.training.components.rates)), 0


def kind_of(prepared: Prepared) -> str:
    """`lora of rank 16`, or `full fine-tune`."""
    network = prepared.config.network
    return f"{network.type} of rank {network.rank}" if network is not None else "full fine-tune"


TRAIN = Train()
