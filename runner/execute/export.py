"""Makes a file that other programs load from one checkpoint. Exports are kept in the store by what they are made of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from runner.atomic import new_folder, remove
from runner.core.precision import DTYPES
from runner.errors import UsageError
from runner.execute.metadata import publish_metadata
from runner.files import file_digest
from runner.formats.adapter_modules import Form, needs_base
from runner.formats.adapter_names import DORA_NORM
from runner.formats.adapter_write import Base, diffusers_state, kohya_state
from runner.formats.markers import V_PRED, ZTSNR
from runner.identity import fingerprint
from runner.inputs.publish import PUBLISH_VERSION
from runner.inputs.train import TrainInputs
from runner.networks.merge import merged
from runner.plan.prepare import Prepared
from runner.records import said, sound_record, write_record
from runner.stages.checkpoints import Checkpoints
from runner.stages.context import Context
from runner.stages.modules import build
from runner.weights.tensors import write_hashed_tensors, write_tensors

MANIFEST = "manifest.json"
_IN_ADAPTER = re.compile(r"\.(lora_(A|B|magnitude_vector)|hada_w\d_[ab]|lokr_w\d(_[ab])?|oft_R)(\.|$)")
FORMATS = ("kohya", "diffusers", "comfyui", "single_file")


class Exporter:
    """Writes exports of one run's checkpoints."""

    def __init__(
        self, context: Context, prepared: Prepared, train: TrainInputs, checkpoints: Checkpoints, run: str
    ) -> None:
        # Files are put together on the host: a whole model beside the rest may not fit on the device.
        self.context = replace(context, device=torch.device("cpu"))
        self.prepared, self.train, self.checkpoints, self.run = prepared, train, checkpoints, run

    def export(self, step: int, weights: str, form: str, dtype: str) -> Path:
        """A file, or a folder: of a whole diffusers model, of several whole denoisers for ComfyUI. Raises `UsageError` for a format that does not apply."""
        adapter = self.train.targets is not None
        if form == "kohya" and not adapter:
            raise UsageError(
                "format kohya is a LoRA file, but this is a full fine-tune",
                hint="use single_file, comfyui or diffusers",
            )
        metadata = publish_metadata(self.prepared, step, weights, self.run, adapter and form != "single_file")
        key = fingerprint([PUBLISH_VERSION, self.train.trajectory(), step, weights, form, dtype, metadata])
        folder = self.context.store.root / "exports" / key
        several = len(self.context.runtime.model.denoisers) > 1
        is_folder = not adapter and (form == "diffusers" or (form == "comfyui" and several))
        name = "model" if is_folder else "weights.safetensors"
        if not self._is_sound(folder):
            state = self.checkpoints.load(step, weights)
            remove(folder)
            with new_folder(folder) as staged:
                if is_folder:
                    (staged / name).mkdir()
                self._write(staged / name, state, form, DTYPES[dtype], metadata)
                files = sorted(file for file in staged.rglob("*") if file.is_file())
                digests = {file.relative_to(staged).as_posix(): file_digest(file) for file in files}
                write_record(staged / MANIFEST, {"version": PUBLISH_VERSION, "files": digests})
        return folder / name

    def _is_sound(self, folder: Path) -> bool:
        """Whether an export is there and is what was written."""
        manifest = sound_record(folder / MANIFEST, {"files": {str: str}})
        if manifest is None:
            return False
        for name, digest in manifest["files"].items():
            file = folder / name
            if not file.is_file() or self.checkpoints.digest(file) != digest:
                said.warning("%s is not what was written; it is made again", file)
                return False
        return True

    def _write(
        self, target: Path, state: Mapping[str, Tensor], form: str, dtype: torch.dtype, metadata: dict[str, str]
    ) -> None:
        targets = self.train.targets
        if targets is not None and form in ("kohya", "comfyui"):
            naming: Form = "kohya" if form == "kohya" else "comfyui"
            if naming == "comfyui" and any(adapter.adapter == "dora" for adapter in targets):
                metadata = {**metadata, DORA_NORM: "base"}
            base = None
            if needs_base(targets, naming):
                weights = plain_states(build(self.context, self.train, None, plain=True).modules)
                base = Base(weights, self.prepared.spec.layers(self.prepared.model))
            write_hashed_tensors(target, kohya_state(targets, state, dtype, base, naming), metadata)
        elif targets is not None and form == "diffusers":
            tensors, extra = diffusers_state(targets, state, dtype)
            write_tensors(target, tensors, {**metadata, **extra})
        elif form == "single_file":
            whole = (
                self.context.family.single_file(self.context.runtime.model, self._whole(state, dtype)) | self._markers()
            )
            write_hashed_tensors(target, {name: tensor.contiguous() for name, tensor in whole.items()}, metadata)
        elif form == "comfyui":
            model = self.context.runtime.model
            for name, own in self._whole(state, dtype, only=model.denoising).items():
                file = target if len(model.denoisers) == 1 else target / f"{name}.safetensors"
                named = self.context.family.denoiser_file(model, name, own)
                write_hashed_tensors(file, named | self._markers(), metadata)
        else:
            model, numerics = self.context.runtime.model, self.context.numerics
            self.context.family.save_pipeline(
                target, model, self._whole(state, dtype), numerics.prediction_type, numerics.zero_terminal_snr
            )

    def _markers(self) -> dict[str, Tensor]:
        """The empty tensors by which a checkpoint in one file says what it predicts."""
        numerics = self.context.numerics
        marks = {V_PRED: numerics.prediction_type == "v_prediction", ZTSNR: numerics.zero_terminal_snr}
        return {name: torch.empty(0) for name, says in marks.items() if says}

    def _whole(
        self, state: Mapping[str, Tensor], dtype: torch.dtype, only: tuple[str, ...] | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """Component → state dict with what was trained in place, the adapters merged, in the export's dtype."""
        trained = build(self.context, self.train, None, plain=True)
        if self.train.targets is None:
            trained.assign(state)
        return whole_model(self.context, trained.modules, self.train, state, dtype, only)


def whole_model(
    context: Context,
    modules: Mapping[str, nn.Module],
    train: TrainInputs,
    state: Mapping[str, Tensor],
    dtype: torch.dtype,
    only: tuple[str, ...] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Component → state dict, of these modules and freshly loaded others; the run's adapters of `state` are merged."""
    names = only or tuple(context.runtime.model.components)
    others = {name: context.load(name, plain=True) for name in names if name not in modules}
    base = plain_states({name: modules.get(name) or others[name] for name in names})
    if train.targets is not None:
        base = merged(train.targets, {key: tensor.cpu() for key, tensor in state.items()}, base)
    return {name: {key: tensor.to(dtype).contiguous() for key, tensor in own.items()} for name, own in base.items()}


def plain_states(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """Component → state dict on the CPU without adapters: the key of a layer with an adapter is its own again."""
    return {
        name: {
            key.replace(".base_layer.", "."): tensor.detach().cpu()
            for key, tensor in module.state_dict().items()
            if not _IN_ADAPTER.search(key)
        }
        for name, module in modules.items()
    }
