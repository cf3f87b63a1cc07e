"""What every section of run.toml is made of: a strict, frozen pydantic model whose keys declare what changing them does.

The docstring under a key is its documentation; `runner explain`, the JSON Schema and docs/run_toml.md are made from it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Effect = Literal["trajectory", "bits", "none"]
"""What changing a key does to a run.

trajectory: other numbers, so the stage that the key belongs to (and what follows from it) is made anew.
bits: the same mathematics in other bytes (attention, compile); nothing is made anew, a resume warns, the lock records it.
none: paths, names, logging, speed.
"""

Stage = Literal["cache.latents", "cache.text", "train", "sample", "select", "publish"]
"""The first node of the graph that a key reaches."""


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
