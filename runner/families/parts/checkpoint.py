"""Finds a model's components in single files, diffusers directories and files of their own; torch-free, headers only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runner.families.identify import identify
from runner.families.locate import KeyPath, child_folder, locate_model
from runner.families.parts.files import BUILTIN, CHECKPOINT, header_of, read_json, shards_of, weight_files
from runner.families.parts.match import frozen, layers_of, listed, match_part, scales
from runner.families.parts.part import Part
from runner.families.parts.schedule import check_schedule
from runner.families.parts.tokenizer_files import find_tokenizer, tokenizer_files
from runner.families.parts.tokenizer_fit import misfit
from runner.files import parsing
from runner.model.layers import Layer, count
from runner.model.model import Component, Model, ModelProblem, is_denoiser
from schemas import RunConfig

MOST_LAYERS = 1000
_MOST_NUMBER = 2**31


def _check_sizes(config: Mapping[str, Any], problem: Callable[[str], ModelProblem]) -> None:
    """Numbers of an architecture, before anything is counted with them."""
    for name, value in config.items():
        most = MOST_LAYERS if "layers" in name else _MOST_NUMBER
        if not all(-_MOST_NUMBER < number <= most for number in _numbers(value)):
            raise problem(f"{name} is {str(value)[:40]}")


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in a value, and the lengths of its lists."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            yield len(item)
            waiting += item
        elif isinstance(item, (int, float)):
            yield item


@dataclass(frozen=True)
class Tokenizers:
    """Text encoder → folder of its tokenizer (None: the built-in one), and all files that decide what they do."""

    places: dict[str, Path | None]
    files: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class Finder:
    """Finds the components of one family. `title` is its name in messages."""

    family: str
    title: str
    shipped: Path
    parts: tuple[Part, ...]
    indexes: tuple[str, ...]
    """What model_index.json of its directories says as _class_name."""
    discrete: bool = False
    """Noise levels are steps of a schedule of betas, not a flow."""

    def components(self, config: RunConfig, folder: Path) -> tuple[Path, dict[str, Component]]:
        """(checkpoint, name → component). Raises `ModelProblem`."""
        place = locate_model(config.model.checkpoint, folder, config.model.revision, BUILTIN, CHECKPOINT)
        found: dict[str, Component] = {}
        for part in self.parts:
            given = getattr(config.model, str(part.key[-1])) if part.key is not None else None
            fresh = config.model.from_scratch and bool(config.training.components.of(part.name))
            if given is not None:
                found[part.name] = self._given(part, given, folder, place)
                continue
            component = (
                self._in_folder(part, place, fresh) if place.is_dir() else self._in_file(part, place, CHECKPOINT, fresh)
            )
            if component is not None and is_denoiser(part.name) and _is_another(component, found):
                component = self._absent(part, place)
            if component is not None:
                found[part.name] = component
        for part in self.parts:
            if part.name in found:
                kind, component = part.module.tokenizer, found[part.name]
                tokenizer = kind(component.config) if kind is not None else None
                key = ".".join(map(str, part.key)) if part.key is not None else None
                found[part.name] = replace(component, tokenizer=tokenizer, key=key)
        return place, found

    def tokenizers(
        self, config: RunConfig, folder: Path, place: Path, components: Mapping[str, Component]
    ) -> Tokenizers:
        """The tokenizer of each text encoder, which must be its own. Raises `ModelProblem`."""
        names = sorted(name for name in components if name.startswith("text_encoder"))
        places = {name: find_tokenizer(config, folder, place, int(name[-1])) for name in names}
        for name, found in places.items():
            if found is not None:
                self._check_tokenizer(config, name, found, components[name])
        return Tokenizers(
            places, tuple(dict.fromkeys(file for found in places.values() for file in tokenizer_files(found)))
        )

    def _check_tokenizer(self, config: RunConfig, name: str, place: Path, encoder: Component) -> None:
        number, kind = name[-1], encoder.tokenizer
        if kind is None:
            return
        given = next((key for key in (f"tokenizer_{number}", name) if getattr(config.model, key)), None)
        key: KeyPath = CHECKPOINT if given is None else ("model", given)
        try:
            problem = misfit(place, kind)
        except ModelProblem as damaged:
            raise ModelProblem(key, str(damaged), f"name a whole one with model.tokenizer_{number}") from None
        if problem is not None:
            raise ModelProblem(
                key, problem, f"name the folder of {kind.title}'s own tokenizer with model.tokenizer_{number}"
            )

    def blocks(self, model: Model, denoiser: str) -> tuple[str, ...]:
        """A denoiser's repeated blocks in the order of the forward pass."""
        part = next(part for part in self.parts if part.name == denoiser)
        names = (part.block_of(layer.name) for layer in layers_of(part, model.components[part.name]))
        return tuple(dict.fromkeys(name for name in names if name is not None))

    def scheduler(self, place: Path) -> dict[str, Any]:
        """The scheduler's configuration: the directory's own, else the shipped one."""
        own = place / "scheduler" / "scheduler_config.json"
        shipped = self.shipped / "scheduler" / "scheduler_config.json"
        file = own if place.is_dir() and own.is_file() else shipped
        schedule = read_json(file)
        check_schedule(schedule, file, self.discrete)
        return schedule

    def _config(self, part: Part, place: Path) -> Mapping[str, Any] | None:
        """The architecture: the directory's own, or the shipped one for a single file. None: the part is left out."""
        if not place.is_dir():
            return self._shipped(part)
        index = place / "model_index.json"
        if index.is_file():
            kind = str(read_json(index).get("_class_name", ""))
            if kind and kind not in self.indexes:
                raise ModelProblem(
                    CHECKPOINT, f"{place} is a {kind}, not of family {self.family}", "name the family that it is of"
                )
        file = _sub_folder(part, place) / "config.json"
        if file.is_file():
            return read_json(file)
        if part.optional:
            return None
        raise ModelProblem(
            CHECKPOINT,
            f"{place} is no diffusers directory of {self.title}: {part.folder}/config.json is missing",
            _named_with(part) if part.same_as else "name the folder that holds model_index.json, or a single file",
        )

    def _shipped(self, part: Part) -> Mapping[str, Any]:
        return read_json(self.shipped / (part.same_as or part.folder) / "config.json")

    def _config_beside(self, part: Part, checkpoint: Path) -> Mapping[str, Any] | None:
        """The architecture of a part that is named apart from a directory."""
        alike = part.same_as and not (checkpoint / part.folder).is_dir()
        return self._config(replace(part, folder=part.same_as) if alike else part, checkpoint)

    def _in_folder(self, part: Part, place: Path, fresh: bool) -> Component | None:
        config = self._config(part, place)
        if config is None:
            return None
        sub = _sub_folder(part, place)
        weights = weight_files(sub)
        if not weights and fresh:
            layers = self._make_layers(part, config, CHECKPOINT)
            return Component(
                name=part.name,
                weights=(),
                files=(sub / "config.json",),
                layout="none",
                config=config,
                parameters=count(layers),
            )
        if not weights:
            raise ModelProblem(
                CHECKPOINT,
                f"{sub} holds no weights",
                "expected model.safetensors or diffusion_pytorch_model.safetensors",
            )
        return self._component(part, weights, (sub / "config.json", *weights), config, CHECKPOINT)

    def _in_file(self, part: Part, file: Path, key: KeyPath, fresh: bool) -> Component | None:
        config = self._config(part, file)
        assert config is not None
        weights = shards_of(file, key)
        config = self._fitted(part, config, weights, key)
        if fresh:
            return Component(
                name=part.name,
                weights=(),
                files=(),
                layout="none",
                config=config,
                parameters=count(self._make_layers(part, config, key)),
            )
        return self._component(part, weights, weights, config, key)

    def _given(self, part: Part, given: str, folder: Path, checkpoint: Path) -> Component:
        assert part.key is not None
        place = locate_model(given, folder, None, BUILTIN, part.key)
        if not place.is_dir():
            weights = shards_of(place, part.key)
            config = (self._config_beside(part, checkpoint) if checkpoint.is_dir() else None) or self._fitted(
                part, self._shipped(part), weights, part.key
            )
            component = self._component(part, weights, weights, config, part.key)
        else:
            sub = child_folder(place, part.folder)
            weights, file = weight_files(sub), sub / "config.json"
            if not weights or not file.is_file():
                raise ModelProblem(part.key, f"{sub} needs config.json and a weights file")
            component = self._component(part, weights, (file, *weights), read_json(file), part.key)
        assert component is not None
        return component

    def _fitted(
        self, part: Part, config: Mapping[str, Any], weights: tuple[Path, ...], key: KeyPath
    ) -> Mapping[str, Any]:
        """The shipped configuration, or what files that bring none say of it."""
        if part.fitted is None:
            return config
        return part.fitted(
            config, {name: entry for file in weights for name, entry in header_of(file, key).tensors.items()}
        )

    def _make_layers(self, part: Part, config: Mapping[str, Any], key: KeyPath) -> list[Layer]:
        def problem(reason: str) -> ModelProblem:
            return ModelProblem(key, f"the configuration of the {part.folder} is not one of {self.title} ({reason})")

        _check_sizes(config, problem)
        with parsing(problem):
            return listed(part.module.layers, frozen(config))

    def _component(
        self, part: Part, weights: tuple[Path, ...], files: tuple[Path, ...], config: Mapping[str, Any], key: KeyPath
    ) -> Component | None:
        layers = self._make_layers(part, config, key)
        headers = [header_of(file, key).tensors for file in weights]
        tensors = {name: entry for header in headers for name, entry in header.items()}
        number = {name: index for index, header in enumerate(headers) for name in header}
        match = match_part(part, config, tensors)
        if match.problem is not None:
            kind = identify(tensors)
            if kind is not None and kind.family != self.family and (key == CHECKPOINT or not match.keys):
                hint = f'set family = "{kind.family}"' if kind.family else f"name a file of {self.title} here"
                raise ModelProblem(key, f"{weights[0]} is {kind.words}; the family is {self.family}", hint)
            if not match.keys and key == CHECKPOINT and files == weights:
                return self._absent(part, weights[0])
            raise ModelProblem(key, f"{weights[0]}: the {part.folder} is not that of {self.title}: {match.problem}")
        scaled = scales(tensors, {origin.key for origin in match.keys.values() if not origin.identity})
        if isinstance(scaled, str):
            raise ModelProblem(
                key, f"{weights[0]}: {scaled}", "name a file in 16 bit, or in fp8 with a scale for each layer or row"
            )
        keys = {
            name: replace(origin, file=number.get(origin.key, 0), scale=scaled.get(origin.key, ""))
            for name, origin in match.keys.items()
        }
        return Component(
            name=part.name,
            weights=weights,
            files=files,
            layout=match.layout,
            config=config,
            parameters=count(layers),
            keys=keys,
        )

    def _absent(self, part: Part, file: Path) -> Component | None:
        """A single file without this component."""
        if part.optional:
            return None
        raise ModelProblem(
            CHECKPOINT, f"{file} has no {part.folder.replace('_', ' ')} ({part.name})", _named_with(part)
        )


def _named_with(part: Part) -> str:
    return f"name it with {'.'.join(map(str, part.key))}" if part.key else "name a whole checkpoint"


def _is_another(component: Component, found: Mapping[str, Component]) -> bool:
    """Whether its tensors in a file of several parts are those of another one: denoisers have the same names in files of
    their own."""
    own = {(component.weights, origin.key) for origin in component.keys.values()}
    return any((other.weights, origin.key) in own for other in found.values() for origin in other.keys.values())


def _sub_folder(part: Part, place: Path) -> Path:
    """A part's folder in a pipeline's; a folder of the denoiser alone is taken as it is."""
    own = place / part.folder
    alone = part.name == "denoiser" and not own.is_dir() and (place / "config.json").is_file()
    return place if alone else own
