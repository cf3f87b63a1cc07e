"""Where families are: names → addresses of the halves that need no torch. Below everything: what is there is found by name.

A package outside of this one brings a family by an entry point of the group `runner.families`, `name = "module:SPEC"`.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import Protocol

from runner.errors import Invalid
from schemas.base import Section

GROUP = "runner.families"
FAMILIES = {
    "sd15": "runner.families.sd.spec:SD15",
    "sdxl": "runner.families.sd.spec:SDXL",
    "hunyuan_video": "runner.families.hunyuan_video.spec:HUNYUAN_VIDEO",
    "framepack": "runner.families.framepack.spec:FRAMEPACK",
    "flux1": "runner.families.flux1.spec:FLUX1",
    "chroma": "runner.families.chroma.spec:CHROMA",
    "sd3": "runner.families.sd3.spec:SD3",
}
"""The built-in ones. A new one is a line here."""


class Named(Protocol):
    """What is asked of a family below families/: its names and the parts of the schema that it uses."""

    @property
    def name(self) -> str: ...
    @property
    def other_names(self) -> tuple[str, ...]: ...
    @property
    def names_hint(self) -> str: ...
    @property
    def variants(self) -> tuple[str, ...]: ...
    @property
    def model_parts(self) -> tuple[type[Section], ...]: ...
    @property
    def source_parts(self) -> tuple[type[Section], ...]: ...
    @property
    def prompt_parts(self) -> tuple[type[Section], ...]: ...


@cache
def installed() -> dict[str, str]:
    """The built-in families, and those of other packages. Raises `Invalid` where a package's has a name that is taken."""
    found = dict(FAMILIES)
    for point in entry_points(group=GROUP):
        if found.setdefault(point.name, point.value) != point.value:
            package = point.dist.name if point.dist is not None else point.value
            raise Invalid(
                f"the family {point.name!r} of the package {package} has the name of another one",
                hint=f"uninstall one of them: pip uninstall {package}",
            )
    return found


def named(name: str) -> Named:
    """A family's half that needs no torch."""
    found: Named = resolve_name(FAMILIES.get(name) or installed()[name])
    return found
