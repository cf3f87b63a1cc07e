"""The keys of LoRA files: which naming a file uses and whether its layers are the wanted ones; torch-free.

Kohya: `<module>.lora_down.weight`, `.lora_up.weight`, `.alpha`; diffusers/PEFT: `<module>.lora_A.weight`, `.lora_B.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from runner.families.spec import Target
from runner.formats.headers import Header

Naming = Literal["kohya", "diffusers"]
DOWN = {"kohya": ".lora_down.weight", "diffusers": ".lora_A.weight"}
UP = {"kohya": ".lora_up.weight", "diffusers": ".lora_B.weight"}


@dataclass(frozen=True)
class Found:
    """The keys of one adapter in a file."""

    down: str
    up: str
    alpha: str | None


def naming_of(keys: Sequence[str]) -> Naming | None:
    """How a LoRA file names its layers; None where it is no LoRA file."""
    if any(key.endswith(DOWN["kohya"]) for key in keys):
        return "kohya"
    if any(key.endswith(DOWN["diffusers"]) for key in keys):
        return "diffusers"
    return None


def module_name(target: Target, naming: Naming) -> str:
    return target.kohya if naming == "kohya" else target.diffusers


def find_adapters(keys: Sequence[str], targets: Sequence[Target]) -> tuple[dict[str, Found], list[str], list[str]]:
    """(`component.name` → keys, modules of the file that no target has, targets that the file lacks)."""
    naming = naming_of(keys)
    if naming is None:
        return {}, [], [target.name for target in targets]
    present = {key: key for key in keys}
    modules = {key.removesuffix(DOWN[naming]) for key in keys if key.endswith(DOWN[naming])}
    found: dict[str, Found] = {}
    lacking: list[str] = []
    for target in targets:
        names = [module_name(target, naming), module_name(target, naming).replace(".text_model.", ".", 1)]
        module = next((name for name in names if name in modules), None)
        if module is None:
            lacking.append(module_name(target, naming))
            continue
        modules.discard(module)
        alpha = f"{module}.alpha"
        found[f"{target.component}.{target.name}"] = Found(
            module + DOWN[naming], module + UP[naming], alpha if alpha in present else None
        )
    return found, sorted(modules), lacking


def check_adapter_file(header: Header, targets: Sequence[Target]) -> str | None:
    """What keeps a LoRA file from being the start of these adapters; None where everything fits."""
    keys = list(header.tensors)
    if naming_of(keys) is None:
        return "it holds no LoRA layers (of Kohya's or diffusers' naming)"
    found, unknown, lacking = find_adapters(keys, targets)
    if not found:
        return f"none of its {len(unknown)} layers belongs to this model (its first is {unknown[0]})"
    if unknown:
        return f"{len(unknown)} of its layers get no adapter here ({_some(unknown)})"
    if lacking:
        return f"{len(lacking)} layers that get adapters are not in it ({_some(lacking)})"
    known = {key for names in found.values() for key in (names.down, names.up, names.alpha)}
    others = [key for key in keys if key not in known]
    if others:
        return f"{len(others)} of its tensors are not known here ({_some(others)}); is it a plain LoRA?"
    for target in targets:
        names = found[f"{target.component}.{target.name}"]
        problem = _misshapen(header.tensors, names, target)
        if problem is not None:
            return problem
    return None


def _misshapen(tensors: Mapping[str, tuple[str, tuple[int, ...]]], names: Found, target: Target) -> str | None:
    if names.up not in tensors:
        return f"{names.up} is missing"
    rank = tensors[names.down][1][0] if tensors[names.down][1] else 0
    if rank != target.rank:
        return f"{names.down} has rank {rank}, [network] gives this layer {target.rank}"
    inputs = tensors[names.down][1][1] if len(tensors[names.down][1]) > 1 else 0
    outputs = tensors[names.up][1][0] if tensors[names.up][1] else 0
    if (inputs, outputs) != (target.inputs, target.outputs):
        return f"{names.down} is for a layer of {inputs} → {outputs}, this one has {target.inputs} → {target.outputs}"
    return None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
