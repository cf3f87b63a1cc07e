"""What FramePack makes of a prompt: whole sections from a start picture, or one frame from control images; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.config.sections import SectionProblem, parse_sections
from runner.families.framepack.sections import OneFrame, count_sections, frames_of, sections_for_seconds
from runner.families.hunyuan_video.prompts import told_guidance
from runner.families.prompts import PromptFile, PromptPart, PromptProblem, Readying
from schemas.families.framepack import OneFrameInference

DEFAULT_SECONDS = 5.0
"""Length of a video in FramePack's own dialect."""
_ONE_FRAME = ("image_mask", "control_images", "control_masks", "one_frame")
_SECTIONS = ("frames", "seconds", "sections", "end_image", "latent_paddings")


@dataclass(frozen=True, kw_only=True)
class FramepackPrompt(PromptPart):
    """What a prompt says to FramePack."""

    rescale: float = 0.0
    sections: int = 0
    sectioned: tuple[str, ...] = ()
    """Prompt of each section, in time."""
    images: tuple[PromptFile, ...] = ()
    """Start image of each section, in time; one for the others."""
    end_image: PromptFile | None = None
    controls: tuple[PromptFile, ...] = ()
    masks: tuple[PromptFile | None, ...] = ()
    one_frame: OneFrame | None = None
    paddings: tuple[int, ...] | None = None
    rope_scaling: tuple[float, float] | None = None
    """(timestep, factor)."""
    bulk_decode: bool = False

    @property
    def texts(self) -> tuple[str, ...]:
        return self.sectioned

    @property
    def pictures(self) -> Mapping[PromptFile, bool]:
        """A control image's transparency is its mask, where it has no file of its own."""
        plain = [*self.images, self.end_image]
        masked = dict(zip(self.controls, self.masks, strict=True))
        found = {file: False for file in (*plain, *masked, *self.masks) if file is not None}
        return found | {file: True for file, mask in masked.items() if mask is None and file not in plain}

    @property
    def keys(self) -> Mapping[str, tuple[str, ...]]:
        lengths = ("frames", "seconds", "sections")
        return {
            **super().keys,
            "rescale": ("guidance_rescale",),
            "sections": lengths,
            "sectioned": ("prompt", *lengths),
            "images": ("image", "control_images"),
            "controls": ("control_images", "image"),
            "masks": ("control_masks", "image_mask"),
            "one_frame": ("target_index", "control_index", "no_post", "no_2x", "no_4x"),
            "paddings": ("latent_paddings",),
            "rope_scaling": ("rope_scaling_timestep_threshold", "rope_scaling_factor"),
        }

    def facts(self) -> dict[str, Any]:
        def digest(file: PromptFile | None) -> str | None:
            return None if file is None else file.identity()

        files = ("images", "end_image", "controls", "masks")
        found = {name: value for name, value in self.__dict__.items() if name not in files}
        found["one_frame"] = None if self.one_frame is None else list(self.one_frame)
        return found | {
            "images": [digest(file) for file in self.images],
            "end_image": digest(self.end_image),
            "controls": [file.identity(mask is None) for file, mask in zip(self.controls, self.masks, strict=True)],
            "masks": [digest(file) for file in self.masks],
        }


def ready(readying: Readying, index: int, options: Any) -> tuple[int, FramepackPrompt]:
    """(frames, its part). Raises `PromptProblem`."""
    common: dict[str, Any] = {
        "guidance": told_guidance(readying, options),
        "rescale": options.guidance_rescale or 0.0,
        "shift": options.flow_shift,
        "fps": options.fps or readying.spec.defaults.fps,
        "system_prompt": options.custom_system_prompt,
        "bulk_decode": bool(options.bulk_decode),
    }
    if options.rope_scaling_timestep_threshold is not None:
        common["rope_scaling"] = (options.rope_scaling_timestep_threshold, options.rope_scaling_factor or 0.5)
    if readying.model.variant == "one_frame":
        readying.refuse(options, _SECTIONS, "one-frame inference makes one picture")
        return 1, _one_frame(readying, options, common)
    readying.refuse(options, _ONE_FRAME, 'it belongs to model.variant = "one_frame"')
    return _sections(readying, index, options, common)


def _one_frame(readying: Readying, options: Any, common: dict[str, Any]) -> FramepackPrompt:
    given = options.one_frame or OneFrameInference()
    window = readying.model.window
    target = given.target_index if given.target_index is not None else window
    controls = options.control_images or ([options.image] if options.image else [])
    if not controls:
        raise PromptProblem(
            "control_images", "one-frame inference needs control images", 'set control_images = ["…"], or image'
        )
    if len(controls) != len(given.control_index):
        raise PromptProblem(
            "one_frame",
            f"there are {len(controls)} control images, but {len(given.control_index)} positions in control_index",
            "say one position for each",
        )
    masks = options.control_masks or ([options.image_mask] if options.image_mask else [])
    if len(masks) > len(controls):
        raise PromptProblem("control_masks", f"there are {len(masks)} masks for {len(controls)} control images")
    found = [readying.file("control_masks", name) for name in masks]
    image = options.image or controls[0]
    return FramepackPrompt(
        **common,
        images=(readying.file("image" if options.image else "control_images", image),),
        controls=tuple(readying.file("control_images", name) for name in controls),
        masks=(*found, *[None] * (len(controls) - len(found))),
        one_frame=OneFrame(target, tuple(given.control_index), given.no_post, given.no_2x, given.no_4x, window),
    )


def _sections(readying: Readying, index: int, options: Any, common: dict[str, Any]) -> tuple[int, FramepackPrompt]:
    window, factor = readying.model.window, readying.model.frame_factor
    count = _count(readying, options)
    frames = frames_of(count, window, factor)
    if options.frames is not None and options.frames != frames:
        readying.note(index, f"{options.frames} frames are made as {frames} ({count} whole sections)")
    if options.image is None:
        raise PromptProblem(
            "image", "FramePack makes videos from a picture, and this prompt has none", 'set image = "start.png"'
        )
    texts = _for_sections("prompt", options.prompt, count)
    images = [readying.file("image", name) for name in _for_sections("image", options.image, count)]
    forward = readying.model.variant == "f1"
    end, paddings = options.end_image, options.latent_paddings
    for key, value in (("end_image", end), ("latent_paddings", paddings)):
        if forward and value is not None:
            readying.warn(index, key, f'`{key}` is ignored with variant = "f1", which goes forward', "take it out")
    if paddings is not None and not forward and len(paddings) != count:
        raise PromptProblem(
            "latent_paddings",
            f"there are {len(paddings)} latent_paddings for {count} sections",
            "give one for each section",
        )
    return frames, FramepackPrompt(
        **common,
        sections=count,
        sectioned=tuple(texts),
        images=tuple(images),
        end_image=readying.file("end_image", end) if end is not None and not forward else None,
        paddings=tuple(paddings) if paddings is not None and not forward else None,
    )


def _count(readying: Readying, options: Any) -> int:
    """How many sections are made."""
    window, factor = readying.model.window, readying.model.frame_factor
    if options.sections is not None:
        return int(options.sections)
    if options.seconds is not None:
        return sections_for_seconds(options.seconds, window)
    if options.frames is None and readying.dialect == "framepack":
        return sections_for_seconds(DEFAULT_SECONDS, window)
    return max(1, count_sections(options.frames or 1, window, factor))


def _for_sections(key: str, text: str, count: int) -> list[str]:
    try:
        said = parse_sections(text)
        said.check(count)
    except SectionProblem as problem:
        raise PromptProblem(key, f"`{key}`: {problem}") from None
    found = [said.of(section, count) for section in range(count)]
    return [text if value is None else value for value in found]
