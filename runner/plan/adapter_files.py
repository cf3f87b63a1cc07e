"""What published adapter files hold and how large they are; torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from runner.formats.adapter_modules import Form, file_modules
from runner.model.targets import Target
from runner.networks.shapes import count_parameters
from schemas import RunConfig

_FORMS: tuple[Form, ...] = ("kohya", "comfyui")


def adapter_numbers(targets: Sequence[Target], form: Form, trainable: int) -> int:
    """Numbers in a file of these adapters, of which `trainable` train."""
    differences = [module for module in file_modules(targets, form) if module.as_differences]
    own = [member for module in differences for member in module.members]
    return trainable - count_parameters(own) + sum(module.numbers for module in differences) if own else trainable


def adapter_file_notes(config: RunConfig, targets: Sequence[Target]) -> list[str]:
    """What the plan says of files that hold differences of the weights in place of the adapter, and of DoRA for ComfyUI."""
    network = config.network
    if network is None:
        return []
    published = {publish.format for publish in config.selection.publish}
    notes = []
    for form in _FORMS:
        if form == "comfyui" and form not in published:
            continue
        modules = file_modules(targets, form)
        whole = [module for module in modules if module.as_differences]
        if whole:
            size = sum(module.numbers for module in whole) * (4 if config.training.checkpoints.dtype == "fp32" else 2)
            what = "best.safetensors" if form == "kohya" else 'files of format = "comfyui"'
            why = (
                "no program reads rotations of the input"
                if network.type == "oft"
                else "a Kronecker product of q, k and v as one layer has no form there"
            )
            notes.append(
                f"{what}: {len(whole)} of {len(modules)} modules are written as differences of the weights, {size / 1e6:,.1f} MB, since "
                f'{why}; format = "diffusers" holds the adapter as it is'
            )
    if network.type == "dora" and "comfyui" in published:
        notes.append(
            "ComfyUI divides DoRA's rows by the length of the base's; its files hold the lengths that give the trained weights "
            "there at strength 1, and are for ComfyUI alone"
        )
    return notes
