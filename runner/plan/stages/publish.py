"""publish: the run's folder, and the files that other programs read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from runner.inputs.publish import PUBLISH_VERSION, PublishInputs
from runner.inputs.select import SelectInputs
from runner.inputs.train import TrainInputs
from runner.plan.adapter_files import adapter_numbers
from runner.plan.compile import Run
from runner.plan.diff import Plan, Planning
from runner.plan.stage import Action, Stage
from runner.plan.stages.cache import BYTES
from runner.plan.stages.select import SELECT
from runner.plan.stages.train import trained_numbers
from runner.store.published import Published, view_is_current


class Publishing(Stage[PublishInputs]):
    """What people look at, and what is published."""

    name = "publish"
    version = PUBLISH_VERSION
    follows: ClassVar[tuple[str, ...]] = (SELECT.name,)
    address = "runner.execute.view:run"
    again = "files are published again"

    def inputs(self, run: Run) -> PublishInputs:
        config = run.config
        select = run.nodes[SELECT.name].identity
        return PublishInputs(
            select, tuple(config.selection.publish), config.training.checkpoints.dtype, config.run.name
        )

    def pending(self, inputs: PublishInputs, planning: Planning) -> Action:
        targets = len(inputs.targets)
        what = f"{targets} target{'s' * (targets != 1)}" if targets else "strip, report, best.safetensors"
        if planning.action(SELECT.name).pending:
            return Action(
                node=self.name,
                symbol="+",
                summary=f"write {what}" if not targets else f"write strip, report, best.safetensors and {what}",
            )
        problem = view_is_current(Published.read(planning.prepared.output_dir), planning.graph.fingerprint(self.name))
        if problem is None:
            return Action(node=self.name, symbol="=", summary="everything is in its place")
        return Action(
            node=self.name, symbol="~", summary="refresh the run's folder and published files", reasons=[problem]
        )

    def disk(self, inputs: PublishInputs, plan: Plan) -> Mapping[str, int]:
        return {"exports": _export_bytes(inputs, plan)} if plan.actions[self.name].pending else {}


def _export_bytes(inputs: PublishInputs, plan: Plan) -> int:
    prepared, select, trained = plan.prepared, plan.graph.of(SelectInputs), plan.graph.of(TrainInputs)
    number, trainable = BYTES[inputs.dtype], trained_numbers(prepared)[0]
    everything = sum(component.parameters for component in prepared.model.components.values())
    denoisers = sum(prepared.model.components[name].parameters for name in prepared.model.denoising)
    adapter = trained.targets is not None
    targets = trained.targets or ()
    sizes = {
        "kohya": adapter_numbers(targets, "kohya", trainable),
        "diffusers": trainable if adapter else everything,
        "comfyui": adapter_numbers(targets, "comfyui", trainable) if adapter else denoisers,
        "single_file": everything,
    }
    forms = {("kohya" if adapter else "single_file", "best"): 1}
    for target in inputs.targets:
        count = 1 if target.which == "best" else len(select.steps) * (2 if select.ema else 1)
        forms[target.format, target.which] = count
    if any(which == "all" for _, which in forms):
        forms = {(form, which): n for (form, which), n in forms.items() if which == "all" or (form, "all") not in forms}
    return sum(count * sizes[form] * number for (form, _), count in forms.items())


PUBLISH = Publishing()
