"""Whether an adapter file can be the start of the adapters that a run trains (network.init_from), by names and shapes, and
where q, k and v share a factor by its bytes; torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from runner.formats.adapter_fit import (
    DECOMPOSED,
    Tensors,
    doubled,
    for_comfyui,
    incomplete,
    kind_of,
    module_problem,
    nothing_fits,
    same_shape,
    some,
)
from runner.formats.adapter_modules import Columns, columns_of
from runner.formats.adapter_names import Module, parse
from runner.model.targets import Target
from runner.networks.shapes import adapter_shapes
from runner.weights.headers import DTYPE_BYTES, Header


def check_adapter_file(file: Path, header: Header, targets: Sequence[Target], decompose_factor: int = -1) -> str | None:
    """What keeps a file from being the start of these adapters; None where everything fits."""
    parsed = parse(header.tensors, targets)
    if not parsed.modules:
        return nothing_fits(header, parsed)
    if parsed.strange:
        return f"{len(parsed.strange)} of its layers get no adapter here ({some(parsed.strange)})"
    found = {layer.full_name: module for module in parsed.modules for layer in module.layers}
    lacking = [target.kohya for target in targets if target.full_name not in found]
    if lacking:
        return f"{len(lacking)} layers that get adapters are not in it ({some(lacking)})"
    if parsed.keys:
        return f"{len(parsed.keys)} of its tensors are not known here ({some(parsed.keys)})"
    if parsed.doubled:
        return doubled(parsed)
    if for_comfyui(header) is not None:
        return for_comfyui(header)
    columns = columns_of(targets)
    for target in targets:
        module = found[target.full_name]
        missing = incomplete(module.keys)
        problem = (
            (f"{module.name} {missing}" if missing is not None else None)
            or _other(header.tensors, module, target, decompose_factor, columns)
            or module_problem(header.tensors, module, whole=False)
        )
        if problem is not None:
            return problem
    return _own_factors(file, header, found, targets)


def _own_factors(file: Path, header: Header, found: Mapping[str, Module], targets: Sequence[Target]) -> str | None:
    """Layers that share their first factor here, and have another one each in the file: compares the bytes of these."""
    owners: dict[str, bytes] = {}
    for target in targets:
        module = found[target.full_name]
        if not target.tied or module.fused or not header.begins:
            continue
        key = module.keys["lora_A"]
        dtype, shape = header.tensors[key]
        with open(file, "rb") as stream:
            stream.seek(header.begins[key])
            own = stream.read(prod(shape) * DTYPE_BYTES[dtype])
        if owners.setdefault(target.kohya, own) != own:
            return (
                f"{module.name} has a first factor of its own, which q, k and v of {target.kohya} share here; "
                'network.targets = "attention" has layers that do not share it'
            )
    return None


def _other(tensors: Tensors, module: Module, target: Target, factor: int, columns: Columns) -> str | None:
    """How a module differs from the adapter that [network] gives its layer."""
    kind = kind_of(module.keys) or "bias"
    decomposed = [name for name in DECOMPOSED if name in module.keys]
    if kind == "lora" and decomposed:
        kind = "dora"
    if kind != target.adapter:
        return f"{module.name} is of kind {kind}, [network] says {target.adapter}"
    expected = adapter_shapes(target, factor)
    taken = {
        *expected,
        "alpha",
        *(("lora_mid",) if kind in ("lora", "dora") else ()),
        *(DECOMPOSED if kind == "dora" else ()),
    }
    strange = [name for name in module.keys if name not in taken]
    if strange:
        return f"{module.name} has {some(strange)}, and adapters of type {target.adapter} have none here"
    if module.fused and kind == "loha" and target.full_name in columns:
        return _other_ranks(tensors, module, columns[target.full_name][1])
    if module.fused and kind not in ("lora", "dora"):
        return f"{module.name} is several layers in one, of which each has its own {kind} here"
    if kind in ("lora", "dora"):
        return _other_rank(tensors, module, target, columns.get(target.full_name, (0, 0))[1])
    for name, shape in expected.items():
        key = module.keys.get(name)
        if key is None:
            return f"{module.name} has no {name}"
        if not same_shape(tensors[key][1], shape):
            return f"{key} is {list(tensors[key][1])}, [network] gives this layer {list(shape)}"
    return None


def _other_ranks(tensors: Tensors, module: Module, total: int) -> str | None:
    for name in ("hada_w1_b", "hada_w2_b"):
        key = module.keys[name]
        rank = (*tensors[key][1], 0)[0]
        if rank != total:
            return f"{key} has rank {rank}; several layers in one have {total} together here, each its own"
    return None


def _other_rank(tensors: Tensors, module: Module, target: Target, total: int) -> str | None:
    """`total`: of all the layers of its module that get adapters."""
    key = module.keys.get("lora_mid", module.keys["lora_A"])
    rank = (*tensors[key][1], 0)[0]
    parts = module.layers[0].part[1]
    # Ours, and Kohya's split_qkv, have an own first factor for each of q, k and v in one tensor.
    if rank != target.rank and not (module.fused and rank in (target.rank * parts, total)):
        return f"{key} has rank {rank}, [network] gives this layer {target.rank}"
    magnitude = tensors[module.keys["dora_scale"]][1] if "dora_scale" in module.keys else None
    if magnitude and magnitude[0] != module.layers[0].module_outputs:
        return f"{module.keys['dora_scale']} has a magnitude for each input, adapters here have one for each row"
    return None
