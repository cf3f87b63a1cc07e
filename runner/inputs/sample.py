"""What sampling is given, and the keys of pictures; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from runner.facts import Fact, KnownAfter, Tree, said, values
from runner.families.prompts import ReadyPrompt
from runner.identity import canonical, fingerprint, identity
from runner.model.numerics import Numerics

SAMPLE_VERSION = 1


@dataclass(frozen=True)
class BaseModel:
    """The untrained model; its pictures and losses are shared by all runs on it."""

    weights: Mapping[str, Fact]
    from_scratch: bool
    base_weights: Tree

    def facts(self) -> Tree:
        from_scratch = said(self.from_scratch, "model.from_scratch")
        return {"weights": self.weights, "from_scratch": from_scratch, "base_weights": self.base_weights}

    @cached_property
    def identity(self) -> str:
        return identity("base", canonical(values(self.facts())))


@dataclass(frozen=True, kw_only=True)
class SampleInputs:
    """sample: the pictures of the base model and of each kept checkpoint."""

    trajectory: str | KnownAfter
    base: BaseModel
    steps: tuple[int, ...]
    ema: bool
    prompts: tuple[ReadyPrompt, ...]
    numerics: Numerics
    frozen: Mapping[str, Fact]
    """Digests of the autoencoder, the text encoders and the tokenizers."""
    prompt_weighting: bool
    tile_size: int | None

    def facts(self) -> Tree:
        return {
            "trajectory": said(self.trajectory),
            "base": self.base.facts(),
            "steps": said(self.steps),
            "ema": said(self.ema),
            "numerics": self.numerics.facts(),
            "prompts": {
                "count": said(len(self.prompts), *_PROMPTS),
                **{str(number): _prompt_facts(prompt) for number, prompt in enumerate(self.prompts)},
            },
            **self._settings,
        }

    @cached_property
    def _settings(self) -> Tree:
        return {
            "frozen": self.frozen,
            "prompt_weighting": said(self.prompt_weighting, "sampling.prompt_weighting"),
            "tile_size": said(self.tile_size, "sampling.vae_tile_size", "caching.vae_tile_size"),
        }

    def key(self, prompt: ReadyPrompt, step: int, weights: str) -> str:
        """Key of one picture. Step 0 is the base model."""
        which = ["base", self.base.identity] if step == 0 else [self.trajectory, step, weights]
        settings = [self.numerics.values, values(self._settings)]
        return fingerprint(["picture", SAMPLE_VERSION, which, prompt.facts(), settings])


_PROMPTS = ("sampling.prompts", "sampling.prompt_file")


def _prompt_facts(prompt: ReadyPrompt) -> Tree:
    """What decides a prompt's pictures. A value may stand in the prompt, in [sampling] or in the file of prompts."""
    own = prompt.own.keys if prompt.own is not None else {}
    keys = {"frames": ("frames", "seconds", "sections", "fps"), **own}
    beside = {name: tuple(f"sampling.**.{key}" for key in those) for name, those in keys.items()}
    beside["seed"] = ("sampling.**.seed", "run.seed")
    file = ("sampling.prompt_file", "sampling.dialect")
    return {
        name: said(value, *beside.get(name, (f"sampling.**.{name}",)), *file) for name, value in prompt.facts().items()
    }


def candidates(steps: tuple[int, ...], ema: bool, with_base: bool) -> list[tuple[int, str]]:
    """(step, weights) of everything that is compared; the base model is step 0 and comes first."""
    kinds = ("raw", "ema") if ema else ("raw",)
    return [(0, "raw")] * with_base + [(step, kind) for step in steps for kind in kinds]
