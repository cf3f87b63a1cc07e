"""The files of network.base_weights and their multipliers, as the plan reads them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from runner.errors import InvalidConfig
from runner.plan.adapter_inputs import file_and_multiplier
from runner.weights.tensors import write_tensors
from tests.inprocess import prepared
from tests.support import Place


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e999"])
def test_a_multiplier_that_is_no_finite_number(family_place: Callable[..., Place], number: str) -> None:
    """Merged, it would make every weight NaN or infinite."""
    place = family_place("sd15")
    write_tensors(place.folder / "x.safetensors", {"lora_unet_conv_in.diff": torch.zeros(16, 4, 3, 3)})
    place.write({"network": {"base_weights": [f"x.safetensors:{number}"]}})
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.file)
    assert [(item.message, item.hint) for item in caught.value.diagnostics] == [
        (f"x.safetensors:{number}: the multiplier must be a finite number", "write FILE:0.8")
    ]


def test_a_colon_in_a_files_name(tmp_path: Path) -> None:
    (tmp_path / "style:0.8").touch()
    for text, expected in {
        "style:0.8": ("style:0.8", 1.0),
        "style:0.8:0.5": ("style:0.8", 0.5),
        "a.safetensors:0.5": ("a.safetensors", 0.5),
        "a.safetensors:-1": ("a.safetensors", -1.0),
        "a:b.safetensors": ("a:b.safetensors", 1.0),
        ":0.5": (":0.5", 1.0),
    }.items():
        file, multiplier = file_and_multiplier(text, tmp_path)
        assert (os.path.relpath(file, tmp_path), multiplier) == expected
