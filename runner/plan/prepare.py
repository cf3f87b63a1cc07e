"""Reads everything outside run.toml that a plan depends on, and reports all that is wrong with it at once.

No model is loaded and torch is not imported: headers, configurations, pictures and captions only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from runner.config.load import Loaded
from runner.config.schema import all_keys
from runner.config.source import Source
from runner.dataset.collect import Collection, CollectProblem, collect
from runner.dataset.folders import Folder, SourceProblem, held_out_folders, source_folders
from runner.dataset.known import Progress
from runner.dataset.kohya import options_of, read_dataset_file
from runner.dataset.long_captions import note_long
from runner.dataset.notes import Notes
from runner.dataset.parts import as_found
from runner.dataset.scan import BadItem, scan
from runner.errors import Diagnostic, InvalidConfig
from runner.facts import Fact, Tree, content, said
from runner.families.keys import (
    foreign_model_keys,
    foreign_source_keys,
    takes_controls,
    whose_model_key,
    whose_source_key,
)
from runner.families.prompts import ReadyPrompt, sampler_problem
from runner.families.registry import family_spec
from runner.families.spec import FamilySpec, SourceSays
from runner.families.token_counts import NoTokenizer, count_tokens, tokenizer_file
from runner.files import file_problem, near_name, resolve_path
from runner.identity import canonical, identity
from runner.model.model import Model, ModelProblem
from runner.model.targets import Target
from runner.patterns import BadPattern, SlowPattern
from runner.plan.adapter_files import adapter_file_notes
from runner.plan.adapter_inputs import merged_files, start_file
from runner.plan.noise_rules import noise_findings
from runner.plan.places import Key, check_apart, check_writable
from runner.plan.prompts import PromptReading
from runner.plan.resolve import Derived, Length, resolve, resolve_length, too_much
from runner.plan.step_rules import step_rules
from runner.store.store import Store
from schemas import RunConfig
from schemas.dataset import ItemOptions

DEFER_DIGEST_ABOVE = 2 * 2**30
"""Bytes of unread model files above which a plan does not wait for their digests; apply computes them."""


@dataclass(kw_only=True)
class Prepared:
    """A valid run: its configuration with nothing left open, its model, its items, its prompts."""

    source: Source
    config: RunConfig
    derived: list[Derived]
    length: Length
    spec: FamilySpec
    model: Model
    targets: list[Target]
    collection: Collection
    prompts: list[ReadyPrompt]
    warnings: list[Diagnostic]
    notes: list[str]
    dataset_notes: Notes
    """What of the dataset is left out, changed or derived, counted."""
    store: Store
    init_from: Path | None
    base_weights: list[tuple[Path, float]]
    """The files of network.base_weights and their multipliers."""
    weights: dict[str, Fact] = field(default_factory=dict)
    """Component, tokenizer_1 … and "init_from" → digest, and the key that names it."""
    merged_first: dict[str, Tree] = field(default_factory=dict)
    """The adapters of network.base_weights, in their order: digest and multiplier."""
    read_files: dict[str, str] = field(default_factory=dict)
    """Keys that name a file with settings of the run → its digest."""
    known_after: dict[str, str] = field(default_factory=dict)
    """What is not known of the items yet, by the columns of dataset/item_facts.py → the stage that finds it out."""
    deferred: list[Path] = field(default_factory=list)
    """Model files whose digest was left to apply."""
    graphs: list[tuple[Any, Any]] = field(default_factory=list, init=False, repr=False, compare=False)
    """The graphs that were made of it, with what else they were made of (plan/current.py)."""

    @property
    def folder(self) -> Path:
        return self.source.file.absolute().parent

    @property
    def output_dir(self) -> Path:
        assert self.config.run.output_dir is not None
        return Path(self.config.run.output_dir)


def prepare(
    loaded: Loaded,
    store: Store,
    *,
    progress: Progress | None = None,
    may_defer: bool = True,
    drawn_seeds: Callable[[Path], dict[int, int]] = lambda _: {},
) -> Prepared:
    """Raises `InvalidConfig` with every finding."""
    if loaded.config is None:
        raise InvalidConfig(loaded.diagnostics)
    return _Preparation(loaded, loaded.config, store, progress, may_defer, drawn_seeds).run()


class _Preparation:
    def __init__(
        self,
        loaded: Loaded,
        config: RunConfig,
        store: Store,
        progress: Progress | None,
        may_defer: bool,
        drawn_seeds: Callable[[Path], dict[int, int]],
    ) -> None:
        self.source, self.config, self.store = loaded.source, config, store
        self.findings = list(loaded.diagnostics)
        self.progress, self.may_defer, self.drawn_seeds = progress, may_defer, drawn_seeds
        self.folder = self.source.file.absolute().parent
        self.spec = family_spec(config.model.family)
        self.options: list[ItemOptions] = []
        self.dataset_notes = Notes()

    def run(self) -> Prepared:
        model = self._model()
        self.spec = self.spec.of(model) if model is not None else self.spec
        targets = self._targets(model) if model is not None else []
        prompts, notes = self._prompts(model)
        init_from = start_file(self.config.network, targets, self.folder, self._error)
        base_weights = merged_files(self.config.network, self.spec, model, self.folder, self._error)
        self._blocks(model)
        self._refused_keys()
        check_writable(self.config, self.folder, self._error)
        collection = self._collection(model)
        if any(finding.severity == "error" for finding in self.findings) or model is None or collection is None:
            raise InvalidConfig(self.findings)
        config, derived = resolve(self.config, self.spec, model, self.folder, self.options)
        self.findings += noise_findings(self.config, config, model, self.source)
        if any(finding.severity == "error" for finding in self.findings):
            raise InvalidConfig(self.findings)
        config, length, more = resolve_length(config, collection.batches_per_epoch)
        excess = too_much(config, length, len(prompts))
        if excess is not None:
            self._error(*excess)
            raise InvalidConfig(self.findings)
        self._long_captions(config, model, collection)
        assert config.run.output_dir is not None
        self.findings += step_rules(config, self.source, length)
        if any(finding.severity == "error" for finding in self.findings):
            raise InvalidConfig(self.findings)
        warnings = [finding for finding in self.findings if finding.severity == "warning"]
        remarks = self.spec.remarks(config, model) if self.spec.remarks is not None else []
        notes = [*notes, *remarks, *adapter_file_notes(config, targets)]
        prepared = Prepared(
            source=self.source,
            config=config,
            derived=derived + more,
            length=length,
            spec=self.spec,
            model=model,
            targets=targets,
            collection=collection,
            prompts=prompts,
            warnings=warnings,
            notes=notes,
            dataset_notes=self.dataset_notes,
            store=self.store,
            init_from=init_from,
            base_weights=base_weights,
        )
        _digests(prepared, self.may_defer)
        return prepared

    def _error(self, key: Key, message: str, hint: str | None = None) -> None:
        self.findings.append(Diagnostic(message, self.source.value_places(key), hint))

    def _model(self) -> Model | None:
        try:
            return self.spec.read(self.config, self.folder)
        except ModelProblem as problem:
            self._error(problem.key, str(problem), problem.hint)
            return None

    def _targets(self, model: Model) -> list[Target]:
        try:
            return self.spec.targets(self.config, model)
        except ModelProblem as problem:
            self._error(problem.key, str(problem), problem.hint)
        except BadPattern:
            assert self.findings, "cross_check looks at patterns"
        except SlowPattern as error:
            own = [("network", name, error.pattern) for name in ("rank_pattern", "alpha_pattern")]
            key = next((key for key in own if self.source.value(key) is not None), ("network", "targets"))
            self._error(key, str(error), error.diagnostics[0].hint)
        return []

    def _prompts(self, model: Model | None) -> tuple[list[ReadyPrompt], list[str]]:
        """The prompts with nothing left open, and notes for the plan."""
        reading = PromptReading(
            config=self.config,
            source=self.source,
            folder=self.folder,
            spec=self.spec,
            store=self.store,
            findings=self.findings,
        )
        prompts = reading.read()
        if model is None:
            return [], []
        config, _ = resolve(self.config, self.spec, model, self.folder, ())
        assert config.run.output_dir is not None
        return reading.ready(prompts, model, config, self.drawn_seeds(Path(config.run.output_dir)))

    def _blocks(self, model: Model | None) -> None:
        """More blocks to swap than there are."""
        memory, sampling = self.config.training.memory, self.config.sampling
        keys: list[tuple[tuple[str, ...], int, bool]] = [
            (("training", "memory", "blocks_to_swap"), memory.blocks_to_swap, True),
            (("sampling", "blocks_to_swap"), sampling.blocks_to_swap or 0, False),
        ]
        for key, wanted, trains in keys:
            if model is None or not wanted:
                continue
            count, most = self.spec.count_blocks(model)[1], self.spec.swap_rule(model, trains).most
            if wanted > most:
                staying = "one must stay" if self.spec.swap is None else "some must stay"
                self._error(key, f"the denoiser has {count} blocks; {staying}", f"blocks_to_swap = {most} at most")

    def _refused_keys(self) -> None:
        """Keys that this family cannot use, and values that it does not know."""
        foreign = {f"model.{key}": f"it belongs to {whose_model_key(key)}" for key in foreign_model_keys(self.spec)}
        for dotted, why in {**foreign, **self.spec.refused_keys}.items():
            path = tuple(dotted.split("."))
            if self.source.value(path) not in (None, False, all_keys()[dotted].default):
                places = self.source.key_places(path)
                message = f"family {self.spec.name} cannot use `{dotted}`: {why}"
                self.findings.append(Diagnostic(message, places, "take it out"))
        variant, variants = self.config.model.variant, self.spec.variants
        if variant is not None and variants and variant not in variants:
            known = " or ".join(f'"{name}"' for name in variants)
            self._error(("model", "variant"), f'family {self.spec.name} has no variant "{variant}"', f"it is {known}")
        for path, message, hint in self.spec.checks(self.config) if self.spec.checks is not None else ():
            self.findings.append(Diagnostic(message, self.source.key_places(path), hint, "warning"))
        length = self.config.model.max_token_length
        if length is not None and length not in self.spec.token_lengths:
            known = ", ".join(map(str, self.spec.token_lengths))
            self._error(
                ("model", "max_token_length"),
                f"family {self.spec.name} cannot use {length} tokens",
                f"it takes {known}",
            )
        sampler = self.config.sampling.sampler
        if sampler is not None and sampler not in self.spec.samplers:
            self._error(("sampling", "sampler"), *sampler_problem(sampler, self.spec))

    def _folders(self) -> list[Folder] | None:
        """The folders of the sources, or those of the dataset file. None where that file is wrong."""
        dataset = self.config.dataset
        if dataset.config_file is None:
            return self._as_family(source_folders(dataset, self.folder, notes=self.dataset_notes))
        file = resolve_path(dataset.config_file, self.folder)
        key = ("dataset", "config_file")
        problem = file_problem(file)
        if problem is not None:
            missing = f"there is no dataset file {file}"
            self._error(key, missing if problem.startswith("there is no file") else problem, near_name(file))
            return None
        try:
            found = read_dataset_file(file, dataset, self.source, self.dataset_notes)
        except InvalidConfig as error:
            self.findings += error.diagnostics
            return None
        self.findings += found.warnings
        folders = found.folders
        if dataset.held_out is not None and any(folder.held_out for folder in folders):
            folders = [replace(folder, held_out=None) for folder in folders]
            places = self.source.key_places(("dataset", "held_out"))
            message = f"`validation_split` in {file.name} gives way to [dataset.held_out]"
            self.findings.append(Diagnostic(message, places, "keep one of them", "warning"))
        return self._as_family(folders)

    def _as_family(self, folders: list[Folder]) -> list[Folder]:
        """The folders with what the family says of their captions."""
        return [replace(folder, whole_captions=True) for folder in folders] if self.spec.whole_captions else folders

    def _collection(self, model: Model | None) -> Collection | None:
        dataset = self.config.dataset
        try:
            folders = self._folders()
            if folders is None:
                return None
            self.options = options_of(folders)
            apart = self._as_family(held_out_folders(dataset, self.folder, folders, self.dataset_notes))
            check_apart(self.config, self.folder, self.store.root, [*folders, *apart], self._error)
            if not self._kinds([*folders, *apart], model):
                return None
            found = scan([*folders, *apart], self.store.index, self.progress, self.dataset_notes)
            scanned, scanned_apart = found.parted()
        except SourceProblem as problem:
            key = ("dataset", "held_out", "path") if problem.number < 0 else self._source_key(problem.number)
            self._error(key, str(problem), problem.hint)
            return None
        if model is None:  # nothing can be said of buckets; what is wrong with the pictures themselves can
            if dataset.on_bad_item == "error":
                self._bad_items(found.bad)
            return None
        step = self.config.dataset.buckets.step
        if step is not None and step % model.size_multiple:
            self._error(
                ("dataset", "buckets", "step"),
                f"step {step} is no multiple of {model.size_multiple}, which the model needs",
            )
        try:
            collection = collect(
                scanned,
                scanned_apart if apart else None,
                dataset.buckets,
                dataset.held_out,
                list(self.spec.defaults.resolution) if self.spec.defaults.resolution else model.native_size,
                model.bucket_step,
                self.config.run.seed,
                self.spec.clips(model) if self.spec.clips else None,
                self.dataset_notes,
                as_found if self.spec.items is None else partial(self.spec.items, model),
            )
        except CollectProblem as problem:
            self._error(problem.key, str(problem), problem.hint)
            return None
        if collection.bad and dataset.on_bad_item == "error":
            self._bad_items(collection.bad)
        elif not any(not item.settings.regularization for item in collection.items):
            self._error(("dataset", "sources"), "no usable item is left to train on")
        return collection

    def _long_captions(self, config: RunConfig, model: Model, collection: Collection) -> None:
        """Says which captions are cut, where their tokenizer can be read here."""
        assert self.spec.text_limit is not None
        encoder, limit = self.spec.text_limit(
            model, config.model.max_token_length or self.spec.defaults.max_token_length
        )
        with contextlib.suppress(NoTokenizer):
            file = tokenizer_file(model, encoder)
            identity = "clip" if file is None else self.store.index.digest(file)
            note_long(
                collection.items,
                limit,
                {length: self.spec.text_limit(model, length)[1] for length in self.spec.token_lengths},
                identity,
                partial(count_tokens, file),
                self.store.index,
                self.dataset_notes,
            )

    def _kinds(self, folders: list[Folder], model: Model | None) -> bool:
        """Sources of a kind that the family does not train on, and keys of a source that do not go together; whether all
        is well."""
        before = len(self.findings)
        foreign = foreign_source_keys(self.spec)
        for folder in folders:
            number, listed = folder.number, folder.listing or {}
            controls = folder.controls is not None or any(entry.controls for entry in listed.values())
            if folder.kind == "video" and self.spec.clips is None:
                self._source_error(number, "kind", f"{self.spec.title} trains on pictures, not on videos")
            for key in (*folder.own, *(["control_path"] if controls else [])):
                if key in foreign:
                    whose = f"family {self.spec.name} cannot use `{key}`: it belongs to {whose_source_key(key)}"
                    hint = "; ".join(takes_controls()) if key == "control_path" else "take it out"
                    self._source_error(number, key, whose, hint)
            if self.spec.sources is not None and model is not None:
                for finding in self.spec.sources(model, SourceSays(folder.kind, controls, folder.own)):
                    self._source_error(number, *finding)
            if folder.kind == "video" and folder.options.alpha_mask:
                self._source_error(number, "alpha_mask", "videos have no transparency", "use mask_path")
        return len(self.findings) == before

    def _source_error(self, number: int, key: str, message: str, hint: str | None = None) -> None:
        """An error at a key of a source, or at the source where the key is not written."""
        own: tuple[str | int, ...] = ("dataset", "sources", number, key)
        if number < 0:
            own = ("dataset", "held_out", key)
            own = own if self.source.value(own) is not None else ("dataset", "held_out", "path")
        elif self.config.dataset.config_file is not None:
            own = ("dataset", "config_file")
        elif self.source.value(own) is None:
            own = ("dataset", "sources", number, "path")
        self._error(own, message, hint)

    def _source_key(self, number: int) -> tuple[str | int, ...]:
        """Where run.toml names a source."""
        if self.config.dataset.config_file is not None:
            return ("dataset", "config_file")
        return ("dataset", "sources", number, "path")

    def _bad_items(self, bad: list[BadItem]) -> None:
        numbers = sorted({item.number for item in bad})
        for number in numbers:
            items = sorted((item for item in bad if item.number == number), key=lambda item: item.name)
            listed = "".join(f"\n  {item.name} {item.reason}" for item in items[:20])
            more = f"\n  … and {len(items) - 20} more" if len(items) > 20 else ""
            key = ("dataset", "held_out", "path") if number < 0 else self._source_key(number)
            noun = "item" if len(items) == 1 else "items"
            self._error(
                key,
                f"{len(items)} {noun} cannot be used:{listed}{more}",
                'mend or remove them, or set dataset.on_bad_item = "skip" to leave them out',
            )


def _digests(prepared: Prepared, may_defer: bool) -> None:
    """The digests of all model files; large unread ones are left to apply, where that is allowed."""
    model, index = prepared.model, prepared.store.index
    files = {file for component in model.components.values() for file in component.files} | set(model.tokenizer_files)
    unknown = [file for file in files if index.known_digest(file) is None]
    if may_defer and sum(file.stat().st_size for file in unknown) > DEFER_DIGEST_ABOVE:
        prepared.deferred = sorted(unknown)
    late = set(prepared.deferred)

    def digest(file: Path) -> str:
        return f"deferred:{file}" if file in late else index.digest(file)

    for name, component in model.components.items():
        parts = [digest(file) for file in component.files]
        if component.layout == "none":
            parts.append("drawn")
        own = identity("component", name, canonical(dict(component.config)), *parts)
        prepared.weights[name] = content(own, *_named_by(component.key))
    for encoder, folder in model.tokenizers.items():
        name = encoder.replace("text_encoder", "tokenizer")
        parts = [digest(file) for file in model.tokenizer_files if file.parent == folder]
        prepared.weights[name] = content(
            identity("tokenizer", *parts) if parts else "clip", *_named_by(f"model.{name}")
        )
    prepared.weights["init_from"] = content(
        None if prepared.init_from is None else index.digest(prepared.init_from), "network.init_from"
    )
    for number, (file, multiplier) in enumerate(prepared.base_weights):
        key = "network.base_weights"
        prepared.merged_first[str(number)] = {
            "file": content(index.digest(file), key, label=file.name),
            "multiplier": said(multiplier, key),
        }
    config = prepared.config
    for key, name_ in (
        ("dataset.config_file", config.dataset.config_file),
        ("sampling.prompt_file", config.sampling.prompt_file),
    ):
        if name_ is not None:
            prepared.read_files[key] = index.digest(resolve_path(name_, prepared.folder))


def _named_by(key: str | None) -> tuple[str, ...]:
    """The keys that may name a component's files, the first that is given counts."""
    return (*([key] if key is not None and key in all_keys() else []), "model.checkpoint")
