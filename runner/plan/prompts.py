"""The prompts of a run: read, filled in, and what is wrong with them shown where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from runner.config.prompts import placed_prompts
from runner.config.source import Source
from runner.dataset.known import known_pictures
from runner.errors import Diagnostic, InvalidConfig, Place
from runner.families.prompts import PromptFile, PromptProblem, Readying, ReadyPrompt, pure_noise
from runner.families.spec import FamilySpec
from runner.files import file_problem, near_name, resolve_path
from runner.model.model import Model
from runner.pictures import ANIMATED, GROUND, TRANSPARENT
from runner.store.store import Store
from schemas import RunConfig
from schemas.sampling import Prompt


@dataclass(frozen=True, kw_only=True)
class PromptReading:
    """Reads the prompts of one run.toml; what is wrong joins `findings`."""

    config: RunConfig
    source: Source
    folder: Path
    spec: FamilySpec
    store: Store
    findings: list[Diagnostic]
    places: list[Mapping[str, tuple[Place, ...]]] = field(default_factory=list)
    """Of each prompt of the file, where its keys stand."""

    def read(self) -> list[Prompt]:
        """The prompts of the file, then those of [[sampling.prompts]]."""
        prompts: list[Prompt] = []
        name = self.config.sampling.prompt_file
        if name is not None:
            file, key = resolve_path(name, self.folder), ("sampling", "prompt_file")
            missing = file_problem(file)
            if missing is not None:
                words = missing.replace("no file", "no prompt file", 1)
                self.findings.append(Diagnostic(words, self.source.value_places(key), near_name(file)))
            else:
                try:
                    found = placed_prompts(file, self.config.sampling.dialect or self.spec.defaults.dialect)
                    prompts += [placed.prompt for placed in found]
                    self.places.extend(placed.places for placed in found)
                except InvalidConfig as error:
                    self.findings.extend(error.diagnostics)
        return prompts + self.config.sampling.prompts

    def ready(
        self, prompts: list[Prompt], model: Model, config: RunConfig, drawn: Mapping[int, int]
    ) -> tuple[list[ReadyPrompt], list[str]]:
        """The prompts with nothing left open, and notes for the plan. `config` is resolved."""
        sampling, files = config.sampling, partial(prompt_file, self.store, self.folder)
        readying = Readying(
            sampling=sampling,
            spec=self.spec,
            model=model,
            seed=config.run.seed,
            drawn=drawn,
            files=files,
            dialect=sampling.dialect,
            pure_noise=pure_noise(config, model),
        )
        ready = []
        for index, prompt in enumerate(prompts):
            try:
                ready.append(readying.ready(index, prompt))
            except PromptProblem as problem:
                self._show(index, len(prompts), problem)
        for index, warning in readying.warnings:
            self._show(index, len(prompts), warning)
        return ready, readying.notes + [note for prompt in ready for note in _picture_notes(prompt)]

    def _show(self, index: int, count: int, problem: PromptProblem) -> None:
        """Where the key stands: in the prompt, in [sampling], or else the prompt itself."""
        number = index - (count - len(self.config.sampling.prompts))
        own: tuple[str | int, ...] = ("sampling", "prompts", number)
        shared = ("sampling", problem.key)
        severity: Literal["warning", "error"] = "warning" if problem.warns else "error"
        if number >= 0 and self.source.value((*own, problem.key)) is not None:
            places = self.source.value_places((*own, problem.key))
        elif number < 0 and problem.key in self.places[index]:
            places = self.places[index][problem.key]
        elif self.source.value(shared) is not None:
            places = self.source.value_places(shared)
        else:
            places = self.source.header_places(own) if number >= 0 else self.places[index][""]
        self.findings.append(Diagnostic(f"prompt {index + 1}: {problem}", places, problem.hint, severity))


def _picture_notes(prompt: ReadyPrompt) -> list[str]:
    """What is left of its pictures that hold more than is used. A control image's transparency is its mask."""
    notes = []
    for file, masked in (prompt.own.pictures if prompt.own is not None else {}).items():
        named = f"prompt {prompt.index + 1}: {Path(file.path).name}"
        if ANIMATED in file.facts:
            notes.append(f"{named} has several frames or pages; the first is used")
        if TRANSPARENT in file.facts and not masked:
            notes.append(f"{named} has transparent pixels; {GROUND} stands behind them")
    return notes


def prompt_file(store: Store, folder: Path, name: str) -> PromptFile:
    """The picture that a prompt names. Raises `PromptProblem`."""
    path = resolve_path(name, folder)
    missing = file_problem(path)
    if missing is not None:
        raise PromptProblem("image", missing.replace("no file", "no picture", 1), near_name(path))
    content = known_pictures(str(path.parent), [path.name], store.index)[path.name]
    if content.problem is not None:
        raise PromptProblem("image", f"{path} {content.problem}")
    return PromptFile(str(path), content.digest, content.facts, (content.width, content.height))
