"""What every section of run.toml is made of: a strict, frozen pydantic model whose keys declare what changing them does.

The docstring under a key is its documentation; `runner explain`, the JSON Schema and docs/run_toml.md are made from it.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Effect = Literal["trajectory", "bits", "none"]
"""What changing a key does to a run.

trajectory: other numbers, so the stage that the key belongs to (and what follows from it) is made anew.
bits: the same mathematics in other bytes (attention, compile); nothing is made anew, a resume warns, the lock records it.
none: paths, names, logging, speed.
"""

Stage = Literal["cache.latents", "cache.text", "train", "sample", "select", "publish"]
"""The first node of the graph that a key reaches."""
ModelStages: tuple[Stage, ...] = ("cache.latents", "cache.text", "train")
"""What another model reaches."""


MOST_STEPS = 10_000_000
"""Of training, and of everything that is counted in steps or epochs."""
MOST_TEXT = 20_000
"""Characters of a prompt or a caption's part."""


def _can_be_a_name(value: str) -> str:
    """A path whose name no file can have would fail in each place that asks for the file."""
    encoded = value.encode("utf-8", "surrogatepass")
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError("no file has a NUL character or half a character in its name")
    if len(encoded) > 4000 or any(len(part) > 255 for part in encoded.replace(b"\\", b"/").split(b"/")):
        raise ValueError("a path has at most 4,000 bytes, and 255 in each of its parts")
    if value.startswith("~") and os.path.expanduser(value).startswith("~"):
        raise ValueError(f"there is no home folder {value.partition('/')[0]} on this machine")
    return value


Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Text = Annotated[str, Field(max_length=MOST_TEXT)]
Name = Annotated[str, Field(max_length=200)]
FilePath = Annotated[str, Field(min_length=1), AfterValidator(_can_be_a_name)]
"""A file or a folder, relative to run.toml's."""


class Section(BaseModel):
    """A table of run.toml. Unknown keys, wrong types, NaN and infinity are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        defer_build=True,
        validate_default=False,
        protected_namespaces=(),
    )


def key(
    default: Any = ...,
    *,
    effect: Effect,
    stage: Stage | tuple[Stage, ...] = (),
    default_factory: Any = None,
    **constraints: Any,
) -> Any:
    """A key of a section: its default, its limits, and what changing it does (`effect`) to which `stage`."""
    stages = (stage,) if isinstance(stage, str) else stage
    extra: dict[str, Any] = {"x-effect": effect, "x-stages": list(stages)}
    if default_factory is not None:
        return Field(default_factory=default_factory, json_schema_extra=extra, **constraints)
    return Field(default, json_schema_extra=extra, **constraints)
