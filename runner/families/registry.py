"""Names of families → where their bundles are. Importing a spec imports no torch; importing a family does."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from runner.families.spec import FamilySpec

if TYPE_CHECKING:
    from runner.families.contract import Family

FAMILIES = {
    "sd15": ("runner.families.sd.spec:SD15", "runner.families.sd.model:SD15"),
    "sdxl": ("runner.families.sd.spec:SDXL", "runner.families.sd.model:SDXL"),
    "hunyuan_video": (
        "runner.families.hunyuan_video.spec:HUNYUAN_VIDEO",
        "runner.families.hunyuan_video.model:HUNYUAN_VIDEO",
    ),
    "framepack": ("runner.families.framepack.spec:FRAMEPACK", "runner.families.framepack.model:FRAMEPACK"),
    "flux1": ("runner.families.flux1.spec:FLUX1", "runner.families.flux1.model:FLUX1"),
    "sd3": ("runner.families.sd3.spec:SD3", "runner.families.sd3.model:SD3"),
}


def family_spec(name: str) -> FamilySpec:
    """The torch-free half."""
    spec = _load(FAMILIES[name][0])
    assert isinstance(spec, FamilySpec)
    return spec


def family(name: str) -> Family:
    """The half with torch."""
    bundle: Family = _load(FAMILIES[name][1])  # type: ignore[assignment]
    return bundle


def _load(address: str) -> object:
    module, _, attribute = address.partition(":")
    return getattr(import_module(module), attribute)
