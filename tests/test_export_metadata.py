"""ss_network_module as the tool writes it that makes such files."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from runner.execute.metadata import publish_metadata
from tests.inprocess import prepared
from tests.support import Place

MODULES = {
    ("sd15", "lora"): "networks.lora",
    ("sdxl", "lora"): "networks.lora",
    ("sd3", "lora"): "networks.lora_sd3",
    ("hunyuan_video", "lora"): "networks.lora",
    ("framepack", "lora"): "networks.lora_framepack",
    ("sd15", "loha"): "lycoris.kohya",
    ("sdxl", "dora"): "lycoris.kohya",
    ("sd3", "lokr"): "lycoris.kohya",
    ("hunyuan_video", "loha"): "networks.loha",
    ("framepack", "lokr"): "networks.lokr",
    ("framepack", "oft"): "lycoris.kohya",
}


@pytest.mark.parametrize(("name", "kind"), list(MODULES))
def test_the_network_module_is_the_tools(family_place: Callable[..., Place], name: str, kind: str) -> None:
    run = prepared(family_place(name).write({"network": {"type": kind, "rank": 2}}))
    assert publish_metadata(run, 1, "raw", "x", True)["ss_network_module"] == MODULES[name, kind]
