"""The keys of adapter files: which naming a file uses and whether its layers are the wanted ones; torch-free.

Kohya and LyCORIS: `<module>.lora_down.weight`, `.lora_up.weight`, `.alpha`, `.dora_scale`, `.hada_w1_a`, `.lokr_w1`, …
diffusers and peft: `<module>.lora_A.weight`, `.lora_B.weight`, `.lora_magnitude_vector`, `.hada_w1_a`, `.oft_R.weight`, …
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from runner.families.spec import Adapter, Target
from runner.formats.headers import Header
from runner.networks.shapes import adapter_shapes

Naming = Literal["kohya", "diffusers"]
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]

_LYCORIS = (
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a",
    "lokr_w2_b", "hada_t1", "hada_t2", "lokr_t2",
)  # fmt: skip
_SUFFIXES = {
    ".lora_down.weight": "lora_A", ".lora_up.weight": "lora_B", ".lora_A.weight": "lora_A", ".lora_B.weight": "lora_B",
    ".lora_A.default.weight": "lora_A", ".lora_B.default.weight": "lora_B",
    ".alpha": "alpha", ".dora_scale": "lora_magnitude_vector", ".lora_magnitude_vector": "lora_magnitude_vector",
    ".lora_magnitude_vector.weight": "lora_magnitude_vector", ".oft_R.weight": "oft_R", ".diff": "diff",
    **{f".{name}": name for name in _LYCORIS},
}  # fmt: skip
_PEFT_ROOTS = ("base_model.model.", "")
ADAPTER_METADATA = "lora_adapter_metadata"
"""The key under which diffusers looks for rank and alpha; without it a file is loaded with alpha = rank."""


@dataclass(frozen=True)
class Entry:
    """One layer's adapter in a file: name of each tensor → key."""

    target: Target
    module: str
    keys: Mapping[str, str]
    fused: bool
    """The file's module is several of the model's layers."""

    @property
    def kind(self) -> Adapter | Literal["diff"]:
        names = self.keys.keys()
        if "diff" in names:
            return "diff"
        if any(name.startswith("hada") for name in names):
            return "loha"
        if any(name.startswith("lokr") for name in names):
            return "lokr"
        if "oft_R" in names:
            return "oft"
        return "dora" if "lora_magnitude_vector" in names else "lora"


@dataclass(frozen=True)
class Parsed:
    """What a file holds for a model's layers: full name → entry; modules and keys that are not known."""

    entries: dict[str, Entry]
    modules: list[str]
    keys: list[str]


def module_names(target: Target) -> list[str]:
    """What files may call a layer, ours first: Kohya's, LyCORIS' and diffusers' names, with and without CLIP's outer name."""
    names = [target.kohya, target.diffusers, lycoris_name(target)]
    return [*names, *(name.replace(".text_model.", ".", 1) for name in names if ".text_model." in name)]


def lycoris_name(target: Target) -> str:
    """The name by which LyCORIS and ComfyUI know a layer of a denoiser by its diffusers name."""
    return "lycoris_" + target.name.replace(".", "_")


def is_adapter_file(keys: Iterable[str]) -> bool:
    """Whether a file has any keys of adapters."""
    return any(_split(key)[1] not in (None, "alpha") for key in keys)


def _split(key: str) -> tuple[str, str | None]:
    for suffix, name in _SUFFIXES.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix), name
    return key, None


def parse(keys: Iterable[str], layers: Sequence[Target]) -> Parsed:
    """Finds the layers of a file's adapters among a model's."""
    modules: dict[str, dict[str, str]] = {}
    unknown: list[str] = []
    for key in keys:
        module, name = _split(key)
        if name is None:
            unknown.append(key)
        else:
            modules.setdefault(module, {})[name] = key
    fused = {target.kohya for target in layers if target.part[1] > 1}
    entries: dict[str, Entry] = {}
    used: set[str] = set()
    for target in layers:
        names = (root + name for name in module_names(target) for root in _PEFT_ROOTS)
        found = next((name for name in names if name in modules), None)
        if found is not None:
            used.add(found)
            entries[target.full_name] = Entry(target, found, modules[found], found in fused)
            continue
        alias = next((alias for alias in target.aliases if alias.module in modules), None)
        if alias is not None:
            used.add(alias.module)
            known = replace(target, kohya=alias.module, part=alias.part, span=alias.span, swapped=alias.swapped)
            entries[target.full_name] = Entry(known, alias.module, modules[alias.module], alias.part[1] > 1)
    return Parsed(entries, sorted(modules.keys() - used), unknown)


def check_adapter_file(header: Header, targets: Sequence[Target], decompose_factor: int = -1) -> str | None:
    """What keeps a file from being the start of these adapters; None where everything fits."""
    if not is_adapter_file(header.tensors):
        return "it holds no LoRA layers (of Kohya's or diffusers' naming)"
    parsed = parse(header.tensors, targets)
    if not parsed.entries:
        return f"none of its {len(parsed.modules)} layers belongs to this model (its first is {parsed.modules[0]})"
    if parsed.modules:
        return f"{len(parsed.modules)} of its layers get no adapter here ({_some(parsed.modules)})"
    lacking = [target.kohya for target in targets if target.full_name not in parsed.entries]
    if lacking:
        return f"{len(lacking)} layers that get adapters are not in it ({_some(lacking)})"
    if parsed.keys:
        return f"{len(parsed.keys)} of its tensors are not known here ({_some(parsed.keys)})"
    for entry in parsed.entries.values():
        problem = _misfit(header.tensors, entry, decompose_factor)
        if problem is not None:
            return problem
    return None


def _misfit(tensors: Tensors, entry: Entry, factor: int) -> str | None:
    target = entry.target
    if entry.kind != target.adapter:
        return f"{entry.module} is of kind {entry.kind}, [network] says {target.adapter}"
    expected = adapter_shapes(target, factor)
    for name in expected:
        if name not in entry.keys:
            return f"{entry.module} has no {name}"
    if target.adapter in ("lora", "dora"):
        return _lora_misfit(tensors, entry)
    for name, shape in expected.items():
        found = tensors[entry.keys[name]][1]
        if _flat(found) != _flat(shape):
            return f"{entry.keys[name]} is {list(found)}, [network] gives this layer {list(shape)}"
    return None


def _lora_misfit(tensors: Tensors, entry: Entry) -> str | None:
    target = entry.target
    down, up = tensors[entry.keys["lora_A"]][1], tensors[entry.keys["lora_B"]][1]
    rank = down[0] if down else 0
    # Kohya's split_qkv has an own first factor for each of q, k and v in one tensor.
    if rank != target.rank and not (entry.fused and rank == target.rank * target.part[1]):
        return f"{entry.keys['lora_A']} has rank {rank}, [network] gives this layer {target.rank}"
    inputs, outputs = (down[1] if len(down) > 1 else 0), (up[0] if up else 0)
    wanted = target.module_outputs if entry.fused else target.outputs
    if (inputs, outputs) != (target.inputs, wanted):
        return f"{entry.keys['lora_A']} is for a layer of {inputs} → {outputs}, this one has {target.inputs} → {wanted}"
    return None


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without sides of one, which files leave out or add."""
    return tuple(side for side in shape if side != 1)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
