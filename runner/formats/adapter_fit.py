"""Whether an adapter file can be merged into a model (network.base_weights, runner sample --lora), by names and shapes
alone; torch-free. adapter_start.py: whether it can be the start of a run's adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from runner.formats.adapter_names import DORA_NORM, EMBEDDING, Module, Parsed, is_adapter_file, parse
from runner.model.targets import Target
from runner.networks.shapes import BIASES, skew_side
from runner.weights.headers import Header

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
Shape = tuple[int, ...]

_KINDS = {
    "lora": ("lora_A", "lora_B", "lora_mid"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "glora": ("glora_a1", "glora_a2", "glora_b1", "glora_b2"),
    "oft": ("oft_R",),
    "oft_blocks": ("oft_blocks", "rescale"),
    "diff": ("diff",),
    "norm": ("w_norm",),
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names}
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_NUMBERS = (*_FLOATS, "I64", "I32", "I16", "I8", "U8")
DECOMPOSED = ("dora_scale", "lora_magnitude_vector")


def kind_of(names: Mapping[str, object]) -> str:
    """A module's kind by its tensors; "" where it only changes a bias, or has only what goes with a kind."""
    return next((_KIND_OF[name] for name in names if name in _KIND_OF), "")


@dataclass(frozen=True)
class Checked:
    """A file's modules that can be merged, and what is left out of it."""

    modules: list[Module]
    left_out: list[str]
    """Modules that the model has not, and keys of no known form."""
    problem: str | None = None
    """Why the file cannot be merged."""
    skippable: bool = False
    """The problem is only what would be left out."""


def check_mergeable(header: Header, layers: Sequence[Target], skip_unknown: bool = False) -> Checked:
    """What of a file can be merged into a model. `skip_unknown` leaves out what the model has no layer for, and keys of no
    known form; a module of the model that does not fit is never left out."""
    parsed = parse(header.tensors, layers)
    found = Checked(parsed.modules, [*parsed.strange, *parsed.keys])
    if not parsed.modules:
        return replace(found, problem=nothing_fits(header, parsed))
    if parsed.doubled:
        return replace(found, problem=doubled(parsed))
    if for_comfyui(header) is not None:
        return replace(found, problem=for_comfyui(header))
    problems = (module_problem(header.tensors, module) for module in parsed.modules)
    misfit = next((problem for problem in problems if problem is not None), None)
    if misfit is None and found.left_out and not skip_unknown:
        return replace(found, problem=_unknown(parsed), skippable=True)
    return replace(found, problem=misfit)


def for_comfyui(header: Header) -> str | None:
    """Its magnitudes cannot be told without the base's weights."""
    said = "it is a DoRA written for ComfyUI, whose rule is another one; take the run's kohya or diffusers file"
    return said if header.metadata.get(DORA_NORM) == "base" else None


def nothing_fits(header: Header, parsed: Parsed) -> str:
    if not is_adapter_file(header.tensors):
        return "it holds no LoRA layers (of Kohya's or diffusers' naming)"
    return f"none of its {len(parsed.strange)} layers belongs to this model (its first is {parsed.strange[0]})"


def doubled(parsed: Parsed) -> str:
    return f"{parsed.doubled[0][0]} and {parsed.doubled[0][1]} are for the same layer"


def _unknown(parsed: Parsed) -> str:
    """Names what a file has beside a model's layers."""
    embeddings = [key for key in parsed.keys if key.startswith(EMBEDDING)]
    others = [key for key in parsed.keys if not key.startswith(EMBEDDING)]
    words = []
    if parsed.strange:
        words.append(f"{len(parsed.strange)} of its layers are not this model's ({some(parsed.strange)})")
    if others:
        words.append(f"{len(others)} of its tensors are not known here ({some(others)})")
    if embeddings:
        words.append(
            f"{len(embeddings)} of its tensors are textual inversions, which no layer has ({some(embeddings)})"
        )
    return "; ".join(words)


def module_problem(tensors: Tensors, module: Module, whole: bool = True) -> str | None:
    """Why a module cannot be merged into the layers that it is; None where it can. `whole`: all of its rows are needed."""
    for key in module.keys.values():
        dtype, shape = tensors[key]
        if dtype not in (_NUMBERS if key.endswith("alpha") else _FLOATS):
            return f"{key} is of type {dtype}, not one of floating point"
        if 0 in shape:
            return f"{key} is {list(shape)}: it holds no numbers"
    shapes = {name: tensors[key][1] for name, key in module.keys.items()}
    problem = incomplete(module.keys) or (_partial(module) if whole else None) or _misfit(shapes, module)
    return f"{module.name} {problem}" if problem is not None else None


def incomplete(names: Mapping[str, object]) -> str | None:
    """What is missing of a module's tensors, or too much."""
    kinds = {_KIND_OF[name] for name in names if name in _KIND_OF}
    if len(kinds) > 1:
        return f"is of several kinds ({', '.join(sorted(kinds))})"
    kind = kind_of(names)
    if not kind and not any(name in BIASES for name in names):
        return f"has nothing beside {', '.join(sorted(names))}"
    needed = [*_KINDS[kind][: {"lora": 2, "loha": 4, "glora": 4, "lokr": 0}.get(kind, 1)]] if kind else []
    if "hada_t1" in names or "hada_t2" in names:
        needed += ["hada_t1", "hada_t2"]
    for factor in ("lokr_w1", "lokr_w2") if kind == "lokr" else ():
        halves = [f"{factor}_a", f"{factor}_b"]
        split = any(half in names for half in halves)
        if split and factor in names:
            return f"has {factor} and its halves"
        needed += halves if split else [factor]
    if "lokr_t2" in names:
        needed += ["lokr_w2_a", "lokr_w2_b"]
    missing = [name for name in needed if name not in names]
    if missing:
        return f"has no {missing[0]}"
    decomposed = [name for name in DECOMPOSED if name in names]
    if len(decomposed) > 1 or (decomposed and kind not in ("lora", "loha", "lokr")):
        return f"has {' and '.join(decomposed)}, which {'exclude each other' if kind in ('lora', 'loha', 'lokr') else 'is not for its kind'}"
    return "has diff_b and b_norm" if all(name in names for name in BIASES) else None


def _partial(module: Module) -> str | None:
    """Rows of the module that the model has not."""
    parts, found = module.layers[0].part[1], sum(layer.span for layer in module.layers)
    return f"has {parts} parts, of which the model has {found}" if module.fused and found != parts else None


def _misfit(shapes: Mapping[str, Shape], module: Module) -> str | None:
    """The first tensor whose shape is not one that its kind has for these layers."""
    first = module.layers[0]
    rows, row = first.module_outputs, first.row_shape
    kind = kind_of(shapes)
    if first.kind in ("norm", "embedding") and kind not in ("diff", "norm", ""):
        return f"is {_article(kind)} {kind} on {'a norm' if first.kind == 'norm' else 'an embedding'}, which takes differences only"
    for name in BIASES:
        if name in shapes and not all(layer.bias for layer in module.layers):
            return f"has {name}, and the layer has no bias"
        if name in shapes and _flat(shapes[name]) != _flat((rows,)):
            return _wrong(name, shapes, (rows,))
    if "alpha" in shapes and prod(shapes["alpha"]) != 1:
        return _wrong("alpha", shapes, ())
    problem = _FORMS[kind](shapes, rows, row) if kind else None
    return problem or _magnitude(shapes, rows, row)


def _article(kind: str) -> str:
    return "an" if kind.startswith("oft") else "a"


def _wrong(name: str, shapes: Mapping[str, Shape], wanted: Shape) -> str:
    return f"has {name} {list(shapes[name])}, which must be {list(wanted)}"


def _lora(shapes: Mapping[str, Shape], rows: int, row: Shape) -> str | None:
    down, up, mid = shapes["lora_A"], shapes["lora_B"], shapes.get("lora_mid")
    inner = row if mid is None else row[:1]
    rank = down[0] if down else 0
    if not same_shape(down, (rank, *inner)) and not same_shape(down, (rank, prod(inner))):
        return _wrong("lora_A", shapes, (rank, *inner))
    middle = rank if mid is None else (mid[0] if mid else 0)
    if mid is not None and mid != (middle, rank, *row[1:]):
        return _wrong("lora_mid", shapes, (middle, rank, *row[1:]))
    return None if same_shape(up, (rows, middle)) else _wrong("lora_B", shapes, (rows, middle))


def _loha(shapes: Mapping[str, Shape], rows: int, row: Shape) -> str | None:
    for number in (1, 2):
        problem = _pair(shapes, f"hada_w{number}", f"hada_t{number}", rows, row)
        if problem is not None:
            return problem
    return None


def _pair(shapes: Mapping[str, Shape], name: str, core: str, rows: int, row: Shape) -> str | None:
    """Two factors [rows, rank] and [rank, row], or [rank, rows] and [rank, inputs] about a core [rank, rank, kernel]."""
    first, second = shapes[f"{name}_a"], shapes[f"{name}_b"]
    rank = second[0] if second else 0
    if core not in shapes:
        if second != (rank, prod(row)):
            return _wrong(f"{name}_b", shapes, (rank, prod(row)))
        return None if first == (rows, rank) else _wrong(f"{name}_a", shapes, (rows, rank))
    outer = first[0] if first else 0
    if len(row) < 2:
        return f"has {core}, which is for convolutions"
    for key, wanted in ((core, (outer, rank, *row[1:])), (f"{name}_a", (outer, rows)), (f"{name}_b", (rank, row[0]))):
        if shapes[key] != wanted:
            return _wrong(key, shapes, wanted)
    return None


def _lokr(shapes: Mapping[str, Shape], rows: int, row: Shape) -> str | None:
    small = shapes.get("lokr_w1")
    if small is not None:
        if len(small) < 2 or prod(small[2:]) != 1:
            return f"has lokr_w1 {list(small)}, which must have two sides"
    else:
        first, second = shapes["lokr_w1_a"], shapes["lokr_w1_b"]
        if len(first) != 2 or len(second) != 2 or first[1] != second[0]:
            return f"has lokr_w1_a {list(first)} and lokr_w1_b {list(second)}, which have no product"
        small = (first[0], second[1])
    if rows % small[0] or row[0] % small[1]:
        return f"has {'lokr_w1' if 'lokr_w1' in shapes else 'a lokr_w1'} {list(small[:2])}, which does not divide {rows} x {row[0]}"
    large = (rows // small[0], row[0] // small[1], *row[1:])
    if "lokr_w2" not in shapes:
        return _pair(shapes, "lokr_w2", "lokr_t2", large[0], large[1:])
    fits = same_shape(shapes["lokr_w2"], large) or shapes["lokr_w2"] == (large[0], prod(large[1:]))
    return None if fits else _wrong("lokr_w2", shapes, large)


def _glora(shapes: Mapping[str, Shape], rows: int, row: Shape) -> str | None:
    rank = (*shapes["glora_a2"], 0)[0]
    wanted = {
        "glora_a1": (row[0], rank),
        "glora_a2": (rank, row[0]),
        "glora_b1": (rows, rank),
        "glora_b2": (rank, *row),
    }
    wrong = next((name for name, shape in wanted.items() if not same_shape(shapes[name], shape)), None)
    return None if wrong is None else _wrong(wrong, shapes, wanted[wrong])


def _oft(shapes: Mapping[str, Shape], rows: int, row: Shape) -> str | None:
    found, width = shapes["oft_R"], prod(row)
    side = skew_side(found[1]) if len(found) == 2 else 0
    fits = side and (found[0] * side == width or (found[0] == 1 and width % side == 0))
    return None if fits else f"has oft_R {list(found)}, which are no rotations of {width} inputs"


def _oft_blocks(shapes: Mapping[str, Shape], rows: int, row: Shape) -> str | None:
    found = shapes["oft_blocks"]
    fits = len(found) in (3, 4) and found[-1] == found[-2] and found[-3] * found[-1] == rows
    if fits and len(found) == 4:
        fits = found[-1] % 2 == 0 and found[0] < 64 and rows % (2 ** found[0] * (found[-1] // 2)) == 0
    if not fits:
        return f"has oft_blocks {list(found)}, which are no rotations of {rows} rows"
    rescale = shapes.get("rescale")
    return None if rescale is None or same_shape(rescale, (rows,)) else _wrong("rescale", shapes, (rows,))


def _diff(shapes: Mapping[str, Shape], rows: int, row: Shape) -> str | None:
    name = "diff" if "diff" in shapes else "w_norm"
    return None if same_shape(shapes[name], (rows, *row)) else _wrong(name, shapes, (rows, *row))


_FORMS = {
    "lora": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "glora": _glora,
    "oft": _oft,
    "oft_blocks": _oft_blocks,
    "diff": _diff,
    "norm": _diff,
}


def _magnitude(shapes: Mapping[str, Shape], rows: int, row: Shape) -> str | None:
    """DoRA's magnitude: of each row; under LyCORIS' name also of each input, with a first side of one."""
    for name in DECOMPOSED:
        found = shapes.get(name)
        if found is None:
            continue
        by_row = prod(found) == rows and (found[0] == rows or name == "lora_magnitude_vector")
        by_input = name == "dora_scale" and prod(found) == row[0] and (found[0] == 1 or len(found) == 1)
        if not by_row and not by_input:
            return f"has {name} {list(found)}, which is of neither the {rows} rows nor the {row[0]} inputs"
    return None


def same_shape(found: Shape, wanted: Shape) -> bool:
    """Whether a shape is another but for sides of one at its end, which files leave out or add."""
    return _flat(found) == _flat(wanted)


def _flat(shape: Shape) -> Shape:
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
