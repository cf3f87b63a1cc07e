"""What FramePack makes of an item: sections of a clip, or one frame of a picture with its control images; torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from runner.dataset.parts import Found, ItemPart, ItemProblem, Piece
from runner.families.framepack.sections import OneFrame, SectionOf, count_sections, frames_of
from runner.families.keys import takes_controls
from runner.families.spec import SourceFinding, SourceSays
from runner.model.model import Model
from schemas.families.framepack import OneFrame as OneFrameOptions


@dataclass(frozen=True, kw_only=True)
class FramepackItem(ItemPart):
    """One section, or one frame."""

    section: SectionOf | None = None
    one_frame: OneFrame | None = None

    @property
    def frames(self) -> int | None:
        return None if self.section is None else self.section.window

    @property
    def layout(self) -> str:
        if self.one_frame is not None:
            left_out = [name for name in ("no_post", "no_2x", "no_4x") if getattr(self.one_frame, name)]
            return " ".join(["one frame", f"of {len(self.one_frame.clean_indices)}", *left_out])
        assert self.section is not None
        return f"sections of {self.section.window}"

    @property
    def place(self) -> tuple[int, ...]:
        return () if self.section is None else (self.section.place,)

    @property
    def order(self) -> tuple[Any, ...]:
        return self.section or ()

    def facts(self) -> dict[str, Any]:
        return {"section": tuple(self.section or ()), "one_frame": tuple(self.one_frame or ())}

    @property
    def keys(self) -> Mapping[str, tuple[str, ...]]:
        model = ("model.variant", "model.latent_window_size")
        return {"section": model, "one_frame": ("one_frame", *model)}


def items(model: Model, found: Found) -> list[Piece]:
    """Raises `ItemProblem`."""
    clip, window, factor = found.clip, model.window, model.frame_factor
    if clip is None:
        return [Piece(None, _one_frame(window, found))]
    count = count_sections(clip.length, window, factor)
    if not count:
        raise ItemProblem(f"a section of {window} latent frames needs {frames_of(1, window, factor)}")
    whole = clip._replace(length=frames_of(count, window, factor))
    forward = model.variant == "f1"
    return [Piece(whole, FramepackItem(section=SectionOf(index, count, window, forward))) for index in range(count)]


def _one_frame(window: int, found: Found) -> FramepackItem:
    given: OneFrameOptions = found.said.get("one_frame") or OneFrameOptions()
    target = given.target_index if given.target_index is not None else window
    settings = OneFrame(target, tuple(given.clean_indices), given.no_post, given.no_2x, given.no_4x, window)
    if len(found.pictures) != len(settings.clean_indices):
        indices = f"one_frame.clean_indices {len(settings.clean_indices)}"
        raise ItemProblem(f"has {len(found.pictures)} control images, {indices}")
    return FramepackItem(one_frame=settings, pictures=found.pictures)


def sources(model: Model, says: SourceSays) -> Iterator[SourceFinding]:
    """One frame trains pictures with control images, and videos as I2V does; the others videos alone."""
    stills = model.variant == "one_frame"
    if says.kind == "image" and not stills:
        yield SourceFinding(
            "kind",
            f'FramePack with variant = "{model.variant}" trains on videos, and this source holds pictures',
            'set kind = "video"; pictures are trained with model.variant = "one_frame"',
        )
    if says.kind == "image" and stills:
        if not says.controls:
            yield SourceFinding(
                "path",
                "one-frame training needs control images, and this source has none",
                'set control_path = "folder of pictures of the same names"',
            )
    elif says.controls or "one_frame" in says.own:
        key = "control_path" if says.controls else "one_frame"
        yield SourceFinding(key, f"`{key}` belongs to one-frame training", "; ".join(takes_controls()))
