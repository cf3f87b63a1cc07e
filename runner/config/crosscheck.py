"""Rules between keys, and rules of a value that the schema's types cannot say. Each finding shows every place involved."""

from __future__ import annotations

import re
from collections.abc import Iterator
from string import Formatter

from runner.config.diagnose import dotted
from runner.config.foreign_values import backslash_hint
from runner.config.locate import Path
from runner.config.source import Source, conflict
from runner.config.training_rules import training_rules
from runner.errors import Diagnostic
from runner.patterns import pattern_problem
from schemas import RunConfig

LENGTHS = ("frames", "seconds", "sections")


def cross_check(config: RunConfig, source: Source) -> list[Diagnostic]:
    """All findings, warnings among them."""
    findings: list[Diagnostic] = []
    for rule in (_escapes, _exclusive, _length, _network, _dataset, training_rules, _selection, _patterns):
        findings += rule(config, source)
    return findings


_PATHS = frozenset(
    (
        "checkpoint",
        "vae",
        "image_encoder",
        "init_from",
        "config_file",
        "path",
        "control_path",
        "mask_path",
        "prompt_file",
        "image",
        "end_image",
        "image_mask",
        "directory",
        "output_dir",
        *(f"{kind}_{number}" for kind in ("text_encoder", "tokenizer") for number in (1, 2, 3)),
    )
)
"""Keys that name files and folders."""


def _escapes(config: RunConfig, source: Source) -> Iterator[Diagnostic]:
    """Paths in double quotes in which a backslash has made a tab or a line's end: "C:\\temp\\new"."""
    for section in ("run", "model", "network", "dataset", "sampling", "selection"):
        yield from _escapes_in(source, (section,), source.value((section,)))


def _escapes_in(source: Source, path: Path, node: object) -> Iterator[Diagnostic]:
    if isinstance(node, (dict, list)):
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _escapes_in(source, (*path, name), value)
    elif isinstance(node, str) and path[-1] in _PATHS and re.search(r"[\x07-\x0d\x1b]", node):
        places = source.value_places(path)
        hint = backslash_hint(places[0].text) if places else None
        yield Diagnostic(
            f"`{dotted(path)}` has a character in it that no path has: {node!a}", places, hint or "take it out"
        )


def _exclusive(config: RunConfig, source: Source) -> Iterator[Diagnostic]:
    groups: list[tuple[Path, tuple[str, ...]]] = [
        (("training",), ("max_train_steps", "max_train_epochs")),
        (("training", "scheduler"), ("warmup_steps", "warmup_ratio")),
        (("training", "checkpoints"), ("every_n_steps", "every_n_epochs")),
        (("sampling",), ("every_n_steps", "every_n_epochs")),
        (("dataset", "held_out"), ("fraction", "count", "path")),
        (("sampling",), LENGTHS),
        *((("sampling", "prompts", index), LENGTHS) for index in range(len(config.sampling.prompts))),
    ]
    for section, names in groups:
        given = [name for name in names if source.value((*section, name)) is not None]
        if len(given) > 1:
            listed = " and ".join(f"`{name}`" for name in given)
            yield conflict(
                source,
                f"[{dotted(section)}] has {listed}; they say the same thing",
                [(*section, name) for name in given],
                "keep one of them",
            )
    held_out = source.value(("dataset", "held_out"))
    if isinstance(held_out, dict) and "path" not in held_out:
        section = ("dataset", "held_out")
        for name in (name for name in held_out if name not in ("fraction", "count")):
            yield Diagnostic(
                f"`{name}` of [dataset.held_out] goes with `path`",
                source.key_places((*section, name)),
                "items that are held out of the sources are as in their source; take it out",
            )
    if isinstance(held_out, dict) and not held_out:
        yield Diagnostic(
            "[dataset.held_out] is empty",
            source.header_places(("dataset", "held_out")),
            "give one of fraction, count and path, or leave the section out",
        )


def _length(config: RunConfig, source: Source) -> Iterator[Diagnostic]:
    if config.training.max_train_steps is None and config.training.max_train_epochs is None:
        written = source.value(("training",)) or {}
        if "max_train_steps" not in written and "max_train_epochs" not in written:
            yield Diagnostic(
                "[training] needs `max_train_steps` or `max_train_epochs`",
                source.header_places(("training",)),
                "say how long to train: max_train_steps = 1000",
            )


def _network(config: RunConfig, source: Source) -> Iterator[Diagnostic]:
    network, components = config.network, config.training.components
    if network is not None and config.model.from_scratch:
        yield conflict(
            source,
            "from_scratch draws new weights for the parts that train, but with [network] only the adapter trains",
            [("model", "from_scratch"), ("network",)],
            "leave out [network] to train from scratch, or from_scratch to train an adapter",
        )
    if network is not None and network.conv_alpha is not None and network.conv_rank is None:
        yield conflict(
            source,
            "`conv_alpha` without `conv_rank`: there are no adapters on convolutions",
            [("network", "conv_alpha")],
            "set network.conv_rank too, or take conv_alpha out",
        )
    if network is not None:
        yield from _adapter(config, source)
    if not components.denoiser and not components.text_encoders:
        yield conflict(
            source,
            "nothing trains: every component is off",
            [("training", "components", "denoiser")],
            "turn on training.components.denoiser or text_encoder_1",
        )


_FOR_KINDS: dict[str, tuple[str, ...]] = {
    "dropout": ("lora", "dora"),
    "rank_dropout": ("lora", "loha", "lokr"),
    "module_dropout": ("lora", "loha", "lokr"),
    "decompose_factor": ("lokr",),
    "scale_weight_norms": ("lora",),
    "rslora": ("lora", "dora", "loha", "lokr"),
    "alpha": ("lora", "dora", "loha", "lokr"),
}
"""Kinds of adapters that a key of [network] means something for."""


def _adapter(config: RunConfig, source: Source) -> Iterator[Diagnostic]:
    network = config.network
    assert network is not None
    for name, kinds in _FOR_KINDS.items():
        if source.value(("network", name)) not in (None, False, 0, 0.0, -1) and network.type not in kinds:
            verb = "is for" if len(kinds) == 1 else "is not for"
            yield conflict(
                source,
                f"`{name}` {verb} {kinds[0] if len(kinds) == 1 else network.type}",
                [("network", name), ("network", "type")],
                f"it works with {', '.join(kinds)}; take it out",
            )
    if network.type == "oft" and network.conv_rank is not None:
        yield conflict(
            source,
            "oft on 3x3 convolutions would not start as the model that it is for",
            [("network", "conv_rank"), ("network", "type")],
            "take conv_rank out",
        )


def _dataset(config: RunConfig, source: Source) -> Iterator[Diagnostic]:
    dataset = config.dataset
    written = source.value(("dataset",)) or {}
    if dataset.config_file is not None and dataset.sources:
        yield conflict(
            source,
            "`config_file` owns the sources; [[dataset.sources]] would be others",
            [("dataset", "config_file"), ("dataset", "sources", 0)],
            "keep one of them",
        )
    elif dataset.config_file is None and not dataset.sources and "sources" not in written:
        yield Diagnostic(
            "[dataset] needs a source",
            source.header_places(("dataset",)),
            'add [[dataset.sources]] with path = "FOLDER", or config_file',
        )
    if dataset.config_file is not None and "buckets" in written:
        yield conflict(
            source,
            "`config_file` says the buckets too",
            [("dataset", "config_file"), ("dataset", "buckets")],
            "set enable_bucket, min_bucket_reso, … there, and take [dataset.buckets] out",
        )
    buckets = config.dataset.buckets
    if buckets.min_size is not None and buckets.max_size is not None and buckets.min_size > buckets.max_size:
        yield conflict(
            source,
            f"`min_size` {buckets.min_size} is above `max_size` {buckets.max_size}",
            [("dataset", "buckets", "min_size"), ("dataset", "buckets", "max_size")],
            "swap or change them",
        )
    if config.dataset.sources and all(item.regularization for item in config.dataset.sources):
        yield Diagnostic(
            "every source is a regularization set; there is nothing to train on",
            source.key_places(("dataset", "sources", 0, "regularization")),
            "add a source without regularization = true",
        )
    trained = config.training.components.text_encoders
    if trained and config.caching.text in ("disk", "memory"):
        yield conflict(
            source,
            f'captions cannot be cached (caching.text = "{config.caching.text}") while a text encoder trains',
            [("caching", "text"), *(("training", "components", name) for name in trained)],
            f"leave caching.text out, or turn off training.components.{trained[0]}",
        )


def _selection(config: RunConfig, source: Source) -> Iterator[Diagnostic]:
    selection = config.selection
    if selection.strategy == "manual" and selection.step is None:
        yield Diagnostic(
            'strategy = "manual" needs `step`',
            source.value_places(("selection", "strategy")),
            "add step = the checkpoint to take, or use `runner select run.toml --step N` later",
        )
    if selection.strategy != "manual" and selection.step is not None:
        yield conflict(
            source,
            f'`step` is for strategy = "manual", but the strategy is "{selection.strategy}"',
            [("selection", "step"), ("selection", "strategy")],
            'set strategy = "manual" or take step out',
        )
    if selection.strategy == "best" and not selection.metrics:
        yield Diagnostic(
            'strategy = "best" needs a metric', source.key_places(("selection", "metrics")), 'metrics = ["stable_loss"]'
        )
    for index, publish in enumerate(selection.publish):
        path: Path = ("selection", "publish", index)
        problem = None if publish.name is None else _name_problem(publish.name, config.run.name)
        if problem is not None:
            yield Diagnostic(
                f"`name` {publish.name!r} {problem}",
                source.value_places((*path, "name")),
                "fields are {name}, {step} and {weights}; {step:08} has at least eight digits",
            )
        elif publish.which == "all" and publish.name is not None and "{step" not in publish.name:
            yield Diagnostic(
                'with which = "all" the name needs {step}, or every checkpoint gets the same file',
                source.value_places((*path, "name")),
                f'name = "{publish.name}-{{step}}"',
            )
        if publish.format == "kohya" and config.network is None:
            yield conflict(
                source,
                'format = "kohya" is a LoRA file, but this is a full fine-tune',
                [(*path, "format")],
                'use "single_file", "comfyui" or "diffusers", or add [network]',
            )


LONGEST_NAME = 200
"""Bytes of a published file's name; beside it a temporary one and the extension have to fit into 255."""


def _name_problem(template: str, run: str) -> str | None:
    """Why a template makes no file name; None where it does."""
    try:
        fields = [(field, spec, how) for _, field, spec, how in Formatter().parse(template) if field is not None]
    except ValueError as error:
        return f"cannot be read: {error}"
    for field, spec, how in fields:
        if field not in ("name", "step", "weights"):
            return "has a field that is not known"
        if how or (spec and not (field == "step" and re.fullmatch(r"0(\d|1[0-2])d?", spec))):
            return "has a field with a format that is not known"
    filled = template.format(name=run, step=99_999_999, weights="raw")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in filled):
        return "has a control character in it"
    if filled.strip(".") == "":
        return "would be a folder's name"
    length = len(filled.encode("utf-8"))
    return f"makes a name of {length} bytes; {LONGEST_NAME} are the most" if length > LONGEST_NAME else None


def _patterns(config: RunConfig, source: Source) -> Iterator[Diagnostic]:
    if config.network is None:
        return
    patterns: list[tuple[Path, str]] = []
    if isinstance(config.network.targets, list):
        patterns += [(("network", "targets", index), text) for index, text in enumerate(config.network.targets)]
    for name in ("rank_pattern", "alpha_pattern"):
        patterns += [(("network", name, text), text) for text in getattr(config.network, name)]
    for path, text in patterns:
        problem = pattern_problem(text)
        if problem is not None:
            yield Diagnostic(f"{text!r} is not a regular expression: {problem}", source.value_places(path))
