"""Keys of families that make pictures from other pictures."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from schemas.base import FilePath, Section, key


class ControlSource(Section):
    """The pictures that those of a source are made from."""

    control_path: FilePath | None = key(None, effect="none")
    """A folder of control images of the same names, or several of one picture as name_0, name_1 (framepack, one frame; flux1, Kontext: the references). Their transparency leaves places of them out. Their content decides what is encoded again."""


class ReferencesPrompt(Section):
    """The pictures that one is made from."""

    control_images: Annotated[list[FilePath], Field(min_length=1, max_length=100)] | None = key(
        None, effect="trajectory", stage="sample"
    )
    """Pictures that one-frame inference starts from (framepack; unset: the start image), or the reference that Kontext sees (flux1)."""

    control_masks: Annotated[list[FilePath], Field(min_length=1, max_length=100)] | None = key(
        None, effect="trajectory", stage="sample"
    )
    """What of the control images counts, in their order. Unset: their transparency."""
