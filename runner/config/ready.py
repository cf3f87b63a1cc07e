"""Prompts with nothing left to derive: sizes, lengths, seeds, shifts and the files that they name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from runner.config.prompt_options import strays
from runner.config.sections import SectionProblem, joined, parse_sections
from runner.dataset.buckets import Size
from runner.dataset.clips import whole
from runner.dataset.sections import OneFrame, count_sections, frames_of, sections_for_seconds
from runner.diffusion.timesteps import dynamic_shift
from runner.families.spec import FamilySpec, Model
from runner.pictures import decoding
from runner.seeding import derive
from schemas import RunConfig
from schemas.sampling import OneFrameInference, Prompt, Sampling

DEFAULT_SECONDS = 5.0
"""Length of a video in FramePack's own dialect."""
PURE_NOISE_SAMPLERS = (
    "ddim", "ddpm", "euler", "euler_a", "unipc", "dpm++_2m", "dpm++_2m_karras", "dpm++_sde", "dpm++_sde_karras",
)  # fmt: skip
"""Samplers whose diffusers class can rescale its betas; a test compares this with the classes."""
STILLS = "this family makes stills"
VIDEO_KEYS = (
    "frames", "seconds", "sections", "fps", "embedded_guidance", "guidance_rescale", "flow_shift", "image", "end_image",
    "image_mask", "control_images", "control_masks", "one_frame", "latent_paddings", "custom_system_prompt",
    "rope_scaling_factor", "rope_scaling_timestep_threshold", "bulk_decode",
)  # fmt: skip
_FRAMEPACK = (
    "sections", "guidance_rescale", "image", "end_image", "image_mask", "control_images", "control_masks", "one_frame",
    "latent_paddings", "rope_scaling_factor", "rope_scaling_timestep_threshold", "bulk_decode",
)  # fmt: skip
_ONE_FRAME = ("image_mask", "control_images", "control_masks", "one_frame")


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
class VideoSettings:
    """What a prompt for a video model says beside its text."""

    guidance: float
    rescale: float
    shift: float | None
    fps: float
    sections: int = 0
    texts: tuple[str, ...] = ()
    """Prompt of each section, in time."""
    images: tuple[PromptFile, ...] = ()
    """Start image of each section, in time; one for the others."""
    end_image: PromptFile | None = None
    controls: tuple[PromptFile, ...] = ()
    masks: tuple[PromptFile | None, ...] = ()
    one_frame: OneFrame | None = None
    paddings: tuple[int, ...] | None = None
    system_prompt: str | None = None
    rope_scaling: tuple[float, float] | None = None
    """(timestep, factor)."""
    bulk_decode: bool = False

    def facts(self) -> dict[str, Any]:
        def digest(file: PromptFile | None) -> str | None:
            return None if file is None else file.identity()

        found = {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("images", "end_image", "controls", "masks")
        }
        found["one_frame"] = None if self.one_frame is None else list(self.one_frame)
        return found | {
            "images": [digest(file) for file in self.images], "end_image": digest(self.end_image),
            "controls": [file.identity(mask is None) for file, mask in zip(self.controls, self.masks, strict=True)],
            "masks": [digest(file) for file in self.masks],
        }  # fmt: skip


@dataclass(frozen=True)
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
    video: VideoSettings | None = None
    shift: float | None = None
    """Of a family of stills that moves its noise levels."""
    guidance: float | None = None
    """What the denoiser of a family of stills is told."""
    references: tuple[tuple[PromptFile, Size], ...] = ()
    """Reference pictures and the sizes that they are resized to."""

    @property
    def is_video(self) -> bool:
        """Whether it is a file of several frames."""
        return self.frames > 1

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts that have to be encoded."""
        own = self.video.texts if self.video is not None and self.video.texts else (self.prompt,)
        return tuple(dict.fromkeys((*own, self.negative_prompt)))

    def latent_frames(self, factor: int, window: int) -> int:
        """Latent frames that are made at once."""
        return window if window and self.is_video else (self.frames - 1) // max(1, factor) + 1

    def facts(self) -> dict[str, Any]:
        """What decides the picture, for its key."""
        found = {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("index", "frames", "video", "shift", "guidance", "references")
        }
        if self.guidance is not None:
            found["guidance"] = self.guidance
        if self.references:
            found["references"] = [[file.identity(), *size] for file, size in self.references]
        if self.video is not None:
            found |= {"frames": self.frames, "video": self.video.facts()}
        return found if self.shift is None else found | {"shift": self.shift}


@dataclass
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
        options, model = merged(prompt, self.sampling), self.model
        self._refused(options)
        if prompt.sampler is not None and prompt.sampler not in self.spec.samplers:
            raise PromptProblem("sampler", *sampler_problem(prompt.sampler, self.spec))
        if prompt.sampler is not None and self.pure_noise is not None and prompt.sampler not in PURE_NOISE_SAMPLERS:
            raise PromptProblem("sampler", *pure_noise_problem(prompt.sampler, self.pure_noise))
        for stray in strays(prompt.prompt, in_table=True):
            hint = f"where an option is meant, write {stray.key} = {stray.value if stray.key != 'negative_prompt' else '…'} beside the prompt"
            self.warnings.append(
                (index, PromptProblem("prompt", f"`{stray.written}` is a part of its text", hint, True))
            )
        multiple = model.size_multiple
        width, height = options.width, options.height
        floored = (max(multiple, width // multiple * multiple), max(multiple, height // multiple * multiple))
        if floored != (width, height):
            self.notes.append(
                f"prompt {index + 1}: {width}x{height} is made as {floored[0]}x{floored[1]} (multiples of {multiple})"
            )
        chosen = options.seed if options.seed is not None else derive(self.seed, "prompt", index) & 0xFFFFFFFF
        frames, video = 1, None
        if model.makes_video:
            frames, video = self._video(index, options)
        return ReadyPrompt(
            index, options.prompt, options.negative_prompt or "", *floored, options.num_inference_steps, options.cfg_scale,
            options.sampler, self.drawn.get(index) if chosen == -1 else chosen, frames, video,
            self._shift(options, floored), self._guidance(options), self._references(options),
        )  # fmt: skip

    def _shift(self, options: Any, size: Size) -> float | None:
        """How stills move their noise levels: as said, or by their size where the scheduler does."""
        model = self.model
        if model.makes_video or options.flow_shift is not None:
            return None if model.makes_video else options.flow_shift
        return dynamic_shift(model.scheduler, size[0] * size[1] // model.size_multiple**2)

    def _guidance(self, options: Any) -> float | None:
        """What the denoiser of stills is told."""
        usual = None if self.model.makes_video else self.spec.defaults.embedded_guidance
        return usual if usual is None or options.embedded_guidance is None else options.embedded_guidance

    def _references(self, options: Any) -> tuple[tuple[PromptFile, Size], ...]:
        """The reference pictures of a still, and the sizes that they are resized to."""
        rule = self.spec.references_of(self.model)
        if rule is None or options.control_images is None:
            return ()
        if len(options.control_images) > rule.most:
            raise PromptProblem("control_images", f"there are {len(options.control_images)} control images; the model takes {rule.most}")  # fmt: skip
        files = [self._file("control_images", name) for name in options.control_images]
        return tuple((file, rule.size(file.size)) for file in files)

    def _stills_use(self, key: str) -> bool:
        """Whether a family of stills has this key of video models."""
        defaults = self.spec.defaults
        return {
            "flow_shift": defaults.prediction_type == "flow",
            "embedded_guidance": defaults.embedded_guidance is not None,
            "control_images": self.spec.references_of(self.model) is not None,
        }.get(key, False)

    def _refused(self, options: Any) -> None:
        """Keys that the family cannot use."""
        name, variant = self.spec.name, self.model.variant
        given = [key for key in VIDEO_KEYS if getattr(options, key) is not None]
        for key in given:
            why = None
            if not self.model.makes_video:
                why = None if self._stills_use(key) else STILLS
            elif name != "framepack" and key in _FRAMEPACK:
                why = "it belongs to FramePack"
            elif variant != "one_frame" and key in _ONE_FRAME and name == "framepack":
                why = 'it belongs to model.variant = "one_frame"'
            elif variant == "one_frame" and key in ("frames", "seconds", "sections", "end_image", "latent_paddings"):
                why = "one-frame inference makes one picture"
            if why is not None:
                raise PromptProblem(key, f"family {name} cannot use `{key}`: {why}", "take it out")
        lengths = [key for key in ("frames", "seconds", "sections") if key in given]
        if len(lengths) > 1:
            raise PromptProblem(lengths[1], f"`{lengths[0]}` and `{lengths[1]}` say the same thing", "keep one of them")

    def _video(self, index: int, options: Any) -> tuple[int, VideoSettings]:
        defaults = self.spec.defaults
        guidance = options.embedded_guidance if options.embedded_guidance is not None else defaults.embedded_guidance
        shift = options.flow_shift
        if shift is None and self.spec.name == "hunyuan_video":
            shift = 7.0 if options.num_inference_steps >= 50 else 14.5 if options.num_inference_steps >= 20 else 17.0
        common: dict[str, Any] = {
            "guidance": guidance, "rescale": options.guidance_rescale or 0.0, "shift": shift,
            "fps": options.fps or defaults.fps, "system_prompt": options.custom_system_prompt,
        }  # fmt: skip
        if self.spec.name != "framepack":
            asked = options.frames or (round(options.seconds * common["fps"]) if options.seconds else 1)
            frames = whole(max(1, asked), self.model.frame_factor)
            if frames != asked:
                self.notes.append(f"prompt {index + 1}: {asked} frames are made as {frames} (4n + 1)")
            return frames, VideoSettings(**common)
        if options.rope_scaling_timestep_threshold is not None:
            common["rope_scaling"] = (options.rope_scaling_timestep_threshold, options.rope_scaling_factor or 0.5)
        common["bulk_decode"] = bool(options.bulk_decode)
        if self.model.variant == "one_frame":
            return 1, self._one_frame(options, common)
        return self._sections(index, options, common)

    def _one_frame(self, options: Any, common: dict[str, Any]) -> VideoSettings:
        given = options.one_frame or OneFrameInference()
        window = self.model.window
        target = given.target_index if given.target_index is not None else window
        controls = options.control_images or ([options.image] if options.image else [])
        if not controls:
            raise PromptProblem("control_images", "one-frame inference needs control images", 'set control_images = ["…"], or image')  # fmt: skip
        if len(controls) != len(given.control_index):
            raise PromptProblem(
                "one_frame", f"there are {len(controls)} control images, but {len(given.control_index)} positions in control_index",
                "say one position for each",
            )  # fmt: skip
        masks = options.control_masks or ([options.image_mask] if options.image_mask else [])
        if len(masks) > len(controls):
            raise PromptProblem("control_masks", f"there are {len(masks)} masks for {len(controls)} control images")
        found = [self._file("control_masks", name) for name in masks]
        image = options.image or controls[0]
        return VideoSettings(
            **common, images=(self._file("image" if options.image else "control_images", image),),
            controls=tuple(self._file("control_images", name) for name in controls),
            masks=(*found, *[None] * (len(controls) - len(found))),
            one_frame=OneFrame(target, tuple(given.control_index), given.no_post, given.no_2x, given.no_4x, window),
        )  # fmt: skip

    def _sections(self, index: int, options: Any, common: dict[str, Any]) -> tuple[int, VideoSettings]:
        window, factor = self.model.window, self.model.frame_factor
        if options.sections is not None:
            count = options.sections
        elif options.seconds is not None:
            count = sections_for_seconds(options.seconds, window)
        elif options.frames is None and self.dialect == "framepack":
            count = sections_for_seconds(DEFAULT_SECONDS, window)
        else:
            count = max(1, count_sections(options.frames or 1, window, factor))
        frames = frames_of(count, window, factor)
        if options.frames is not None and options.frames != frames:
            self.notes.append(
                f"prompt {index + 1}: {options.frames} frames are made as {frames} ({count} whole sections)"
            )
        if options.image is None:
            raise PromptProblem(
                "image", "FramePack makes videos from a picture, and this prompt has none", 'set image = "start.png"'
            )
        texts = self._for_sections("prompt", options.prompt, count)
        images = [self._file("image", name) for name in self._for_sections("image", options.image, count)]
        forward = self.model.variant == "f1"
        end, paddings = options.end_image, options.latent_paddings
        for key, value in (("end_image", end), ("latent_paddings", paddings)):
            if forward and value is not None:
                self.warnings.append(
                    (index, PromptProblem(key, f'`{key}` is ignored with variant = "f1", which goes forward', "take it out", True))
                )  # fmt: skip
        if paddings is not None and not forward and len(paddings) != count:
            raise PromptProblem(
                "latent_paddings", f"there are {len(paddings)} latent_paddings for {count} sections", "give one for each section"
            )  # fmt: skip
        return frames, VideoSettings(
            **common, sections=count, texts=tuple(texts), images=tuple(images),
            end_image=self._file("end_image", end) if end is not None and not forward else None,
            paddings=tuple(paddings) if paddings is not None and not forward else None,
        )  # fmt: skip

    def _for_sections(self, key: str, text: str, count: int) -> list[str]:
        try:
            said = parse_sections(text)
            said.check(count)
        except SectionProblem as problem:
            raise PromptProblem(key, f"`{key}`: {problem}") from None
        found = [said.of(section, count) for section in range(count)]
        return [text if value is None else value for value in found]

    def _file(self, key: str, name: str) -> PromptFile:
        try:
            return self.files(name)
        except PromptProblem as problem:
            raise PromptProblem(key, str(problem), problem.hint) from None


def sampler_problem(name: str, spec: FamilySpec) -> tuple[str, str]:
    """What is wrong with a sampler that a family cannot use, and a hint."""
    return f'the sampler "{name}" cannot follow the flow of {spec.title}', f"use one of {', '.join(spec.samplers)}"


def pure_noise(config: RunConfig, model: Model) -> str | None:
    """Why samples start from pure noise, where they do: "which zero_terminal_snr needs". `config` is resolved."""
    if not config.training.loss.zero_terminal_snr:
        return None
    stated = model.stated.get("training.loss.zero_terminal_snr")
    return f"as {stated.why} asks" if stated is not None and stated.value else "which zero_terminal_snr needs"


def pure_noise_problem(sampler: str, why: str) -> tuple[str, str]:
    """What is wrong with a sampler that cannot start from pure noise, and a hint."""
    hint = f"use one of {', '.join(PURE_NOISE_SAMPLERS)}"
    return f'the sampler "{sampler}" cannot start from pure noise, {why}', hint


def merged(prompt: Prompt, sampling: Sampling) -> Any:
    """A prompt with what [sampling] says where it says nothing itself. A length of its own leaves that of [sampling]."""
    values = {name: value for name in Prompt.model_fields if (value := getattr(prompt, name)) is not None}
    lengths = ("frames", "seconds", "sections")
    for name in type(sampling).model_fields:
        value = getattr(sampling, name)
        if name not in Prompt.model_fields or name in values or value is None:
            continue
        if name in lengths and any(other in values for other in lengths):
            continue
        values[name] = value
    return Prompt.model_construct(**{**dict.fromkeys(Prompt.model_fields), **values})


def located(prompt: Any, base: Path, keys: Collection[str] | None = None) -> Any:
    """A prompt (or the defaults of prompts) whose files are named from the folder of the file that it stands in; only
    under `keys`, where they are given."""
    changes: dict[str, Any] = {}
    for key in ("image", "end_image", "image_mask"):
        value = getattr(prompt, key)
        if value is not None and (keys is None or key in keys):
            changes[key] = _located(value, base) if key == "image" else _absolute(value, base)
    for key in ("control_images", "control_masks"):
        value = getattr(prompt, key)
        if value is not None and (keys is None or key in keys):
            changes[key] = [_absolute(name, base) for name in value]
    return prompt.model_copy(update=changes) if changes else prompt


def _located(text: str, base: Path) -> str:
    try:
        said = parse_sections(text)
    except SectionProblem:
        return text  # said where it is used
    return joined({number: _absolute(value, base) for number, value in said.values.items()})


def _absolute(name: str, base: Path) -> str:
    return str(base / Path(name).expanduser())
