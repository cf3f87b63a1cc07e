"""Prompts with nothing left to derive: sizes, seeds, and what a prompt says to its family alone. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from runner.config.prompt_options import PURE_NOISE_SAMPLERS, pure_noise_problem, strays
from runner.dataset.buckets import Size
from runner.diffusion.timesteps import dynamic_shift
from runner.families.keys import foreign_prompt_keys, is_for_videos, whose_prompt_key
from runner.families.references import ReferenceRule, Rules
from runner.families.spec import FamilySpec
from runner.model.model import Model
from runner.pictures import decoding
from runner.seeding import derive
from schemas import RunConfig
from schemas.sampling import Prompt, Sampling

STILLS = "this family makes stills"
LENGTHS = ("frames", "seconds", "sections")
"""Keys that say the same thing."""


class PromptProblem(Exception):
    """A prompt that its family cannot make; `key` is the key of the prompt that is wrong."""

    def __init__(self, key: str, message: str, hint: str | None = None, warns: bool = False) -> None:
        super().__init__(message)
        self.key, self.hint, self.warns = key, hint, warns


class PromptFile(NamedTuple):
    """A picture that a prompt names; its content counts, not its place."""

    path: str
    digest: str
    facts: str = ""
    """runner/pictures.py"""
    size: Size = (0, 0)

    def identity(self, masked: bool = False) -> str:
        """Content and how it is decoded. `masked`: its transparency is a mask."""
        return f"{self.digest} {decoding(self.facts, masked)}".rstrip()


Files = Callable[[str], PromptFile]
"""The file behind a name. Raises `PromptProblem`."""


@dataclass(frozen=True)
class PromptPart:
    """What a prompt says to its family beside text, size and steps. A family that knows more has a class of its own."""

    guidance: float | None = None
    """What a distilled denoiser is told; None: nothing."""
    shift: float | None = None
    """Moves the noise levels of the sampler; None: as the family or the scheduler does."""
    fps: float = 0.0
    """Frames a second that a video is shown at."""
    system_prompt: str | None = None
    """What the text encoder is told to do; None: the family's own words."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Texts that stand in the place of the prompt; none: the prompt itself."""
        return ()

    @property
    def pictures(self) -> Mapping[PromptFile, bool]:
        """The pictures that it names → whether their transparency is used."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What decides the sample."""
        return dict(self.__dict__)

    @property
    def keys(self) -> Mapping[str, tuple[str, ...]]:
        """Name of a fact → the keys of a prompt that it comes from, where those are called otherwise."""
        return {
            "guidance": ("embedded_guidance",),
            "shift": ("flow_shift", "num_inference_steps", "width", "height"),
            "system_prompt": ("custom_system_prompt",),
        }


@dataclass(frozen=True)
class StillPart(PromptPart):
    """Of a still made from other pictures."""

    references: tuple[tuple[PromptFile, Size], ...] = ()
    """Reference pictures and the sizes that they are resized to."""

    @property
    def pictures(self) -> Mapping[PromptFile, bool]:
        return {file: False for file, _ in self.references}

    @property
    def keys(self) -> Mapping[str, tuple[str, ...]]:
        return {**super().keys, "references": ("control_images",)}

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"references": [[file.identity(), *size] for file, size in self.references]}


@dataclass(frozen=True, kw_only=True)
class ReadyPrompt:
    """One picture or video to make, nothing left to derive. `seed` is None while a drawn one (-1) has not been drawn."""

    index: int
    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_inference_steps: int
    cfg_scale: float
    sampler: str
    seed: int | None
    frames: int = 1
    own: PromptPart | None = None
    """What it says to its family alone."""

    @property
    def is_video(self) -> bool:
        """Whether it is a file of several frames."""
        return self.frames > 1

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts that have to be encoded."""
        own = (self.own.texts if self.own is not None else ()) or (self.prompt,)
        return tuple(dict.fromkeys((*own, self.negative_prompt)))

    @property
    def system_prompt(self) -> str | None:
        return self.own.system_prompt if self.own is not None else None

    def latent_frames(self, factor: int, window: int) -> int:
        """Latent frames that are made at once."""
        return window if window and self.is_video else (self.frames - 1) // max(1, factor) + 1

    def facts(self) -> dict[str, Any]:
        """What decides the picture, for its key."""
        found = {name: value for name, value in self.__dict__.items() if name not in ("index", "frames", "own")}
        return found if self.own is None else found | {"frames": self.frames, **self.own.facts()}


@dataclass(kw_only=True)
class Readying:
    """Fills in what prompts leave open; `sampling` has its family's defaults."""

    sampling: Sampling
    spec: FamilySpec
    model: Model
    seed: int
    drawn: Mapping[int, int]
    files: Files
    dialect: str | None = None
    pure_noise: str | None = None
    """As `pure_noise` says it."""
    notes: list[str] = field(default_factory=list)
    warnings: list[tuple[int, PromptProblem]] = field(default_factory=list)

    def ready(self, index: int, prompt: Prompt) -> ReadyPrompt:
        """Raises `PromptProblem`."""
        options = merged(prompt, self.sampling)
        self._refused(options)
        if prompt.sampler is not None and prompt.sampler not in self.spec.samplers:
            raise PromptProblem("sampler", *sampler_problem(prompt.sampler, self.spec))
        if prompt.sampler is not None and self.pure_noise is not None and prompt.sampler not in PURE_NOISE_SAMPLERS:
            raise PromptProblem("sampler", *pure_noise_problem(prompt.sampler, self.pure_noise))
        for stray in strays(prompt.prompt, in_table=True):
            hint = f"where an option is meant, write {stray.key} = {stray.value if stray.key != 'negative_prompt' else '…'} beside the prompt"
            self.warn(index, "prompt", f"`{stray.written}` is a part of its text", hint)
        (width, height), floored = (options.width, options.height), self.size(options)
        if floored != (width, height):
            multiples = f"(multiples of {self.model.size_multiple})"
            self.note(index, f"{width}x{height} is made as {floored[0]}x{floored[1]} {multiples}")
        chosen = options.seed if options.seed is not None else derive(self.seed, "prompt", index) & 0xFFFFFFFF
        frames, own = self.spec.ready(self, index, options) if self.spec.ready is not None else (1, None)
        return ReadyPrompt(
            index=index,
            prompt=options.prompt,
            negative_prompt=options.negative_prompt or "",
            width=floored[0],
            height=floored[1],
            num_inference_steps=options.num_inference_steps,
            cfg_scale=options.cfg_scale,
            sampler=options.sampler,
            seed=self.drawn.get(index) if chosen == -1 else chosen,
            frames=frames,
            own=own,
        )

    def size(self, options: Any) -> Size:
        """The size that is made."""
        multiple = self.model.size_multiple
        width, height = (max(multiple, side // multiple * multiple) for side in (options.width, options.height))
        return width, height

    def note(self, index: int, text: str) -> None:
        """Says what becomes of a prompt, in the plan."""
        self.notes.append(f"prompt {index + 1}: {text}")

    def warn(self, index: int, key: str, message: str, hint: str) -> None:
        """Says that a key of a prompt does nothing."""
        self.warnings.append((index, PromptProblem(key, message, hint, warns=True)))

    def refuse(self, options: Any, keys: Iterable[str], why: str) -> None:
        """Raises `PromptProblem` for the first of the keys that is given."""
        for key in keys:
            if getattr(options, key) is not None:
                raise PromptProblem(key, f"family {self.spec.name} cannot use `{key}`: {why}", "take it out")

    def file(self, key: str, name: str) -> PromptFile:
        """The picture that a key names. Raises `PromptProblem`."""
        try:
            return self.files(name)
        except PromptProblem as problem:
            raise PromptProblem(key, str(problem), problem.hint) from None

    def _refused(self, options: Any) -> None:
        """Keys of other families, and two keys that say the same thing."""
        for key in foreign_prompt_keys(self.spec):
            if getattr(options, key) is not None:
                stills = not self.model.makes_video and is_for_videos(key)
                self.refuse(options, (key,), STILLS if stills else f"it belongs to {whose_prompt_key(key)}")
        lengths = [key for key in LENGTHS if getattr(options, key) is not None]
        if len(lengths) > 1:
            raise PromptProblem(lengths[1], f"`{lengths[0]}` and `{lengths[1]}` say the same thing", "keep one of them")


def stills(
    readying: Readying, index: int, options: Any, references: Rules | None = None
) -> tuple[int, PromptPart | None]:
    """Of stills that follow a flow: how their noise levels are moved, what a distilled denoiser is told, and reference
    pictures."""
    model, size = readying.model, readying.size(options)
    shift = options.flow_shift
    if shift is None:
        shift = dynamic_shift(model.scheduler, size[0] * size[1] // model.size_multiple**2)
    usual = readying.spec.defaults.embedded_guidance
    guidance = usual if usual is None or options.embedded_guidance is None else options.embedded_guidance
    seen = _references(readying, options, None if references is None else references(model))
    if seen:
        return 1, StillPart(guidance, shift, references=seen)
    return 1, None if guidance is None and shift is None else PromptPart(guidance, shift)


def _references(readying: Readying, options: Any, rule: ReferenceRule | None) -> tuple[tuple[PromptFile, Size], ...]:
    """The reference pictures, and the sizes that they are resized to."""
    if rule is None:
        readying.refuse(options, ("control_images", "control_masks"), "this model sees no reference pictures")
        return ()
    readying.refuse(options, ("control_masks",), "reference pictures are seen whole")
    if options.control_images is None:
        return ()
    if len(options.control_images) > rule.most:
        raise PromptProblem(
            "control_images", f"there are {len(options.control_images)} control images; the model takes {rule.most}"
        )
    files = [readying.file("control_images", name) for name in options.control_images]
    return tuple((file, rule.size(file.size)) for file in files)


def sampler_problem(name: str, spec: FamilySpec) -> tuple[str, str]:
    """What is wrong with a sampler that a family cannot use, and a hint."""
    return f'the sampler "{name}" cannot follow the flow of {spec.title}', f"use one of {', '.join(spec.samplers)}"


def pure_noise(config: RunConfig, model: Model) -> str | None:
    """Why samples start from pure noise, where they do: "which zero_terminal_snr needs". `config` is resolved."""
    if not config.training.loss.zero_terminal_snr:
        return None
    stated = model.stated.get("training.loss.zero_terminal_snr")
    return f"as {stated.why} asks" if stated is not None and stated.value else "which zero_terminal_snr needs"


def merged(prompt: Prompt, sampling: Sampling) -> Any:
    """A prompt with what [sampling] says where it says nothing itself. A length of its own leaves that of [sampling]."""
    values = {name: value for name in type(prompt).model_fields if (value := getattr(prompt, name)) is not None}
    for name in type(sampling).model_fields:
        value = getattr(sampling, name)
        if name not in type(prompt).model_fields or name in values or value is None:
            continue
        if name in LENGTHS and any(other in values for other in LENGTHS):
            continue
        values[name] = value
    return type(prompt).model_construct(**{**dict.fromkeys(type(prompt).model_fields), **values})
