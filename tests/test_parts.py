"""A part says how its module is built, loaded, finished, given attention, tiled and counted: nothing else knows its class."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from runner.families.contract import LoadOptions
from runner.families.parts.attention import Attention, diffusers_attention
from runner.families.parts.checkpoint import Finder
from runner.families.parts.files import read_json
from runner.families.parts.load import load_part
from runner.families.parts.match import match_part
from runner.families.parts.modules import make_module
from runner.families.parts.part import ModuleClass, Naming, Part
from runner.families.registry import FAMILIES, family
from runner.model.layers import Layer, Origin
from runner.model.model import Component, Model
from tests.support import ROOT


def finders() -> dict[str, Finder]:
    found = {}
    for name, address in FAMILIES.items():
        module = resolve_name(f"{address.partition(':')[0]}:__dict__")
        found |= {
            finder.family: finder for finder in module.values() if isinstance(finder, Finder) and finder.family == name
        }
    return found


PARTS = [(name, part) for name, finder in finders().items() for part in finder.parts]


def test_every_family_is_looked_at() -> None:
    assert finders().keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_part_has_its_attention_and_its_tiles(name: str, tmp_path: Path) -> None:
    """Of the plain formula's modules none is left with PyTorch's kernel."""
    family(name).tiny(tmp_path)
    for part in finders()[name].parts:
        with torch.device("meta"):
            module: Any = make_module(part.module, read_json(tmp_path / part.folder / "config.json"))
        resolve_name(part.module.attention)(module, Attention(eager=True))
        if part.module.model_type is not None:
            assert module.config._attn_implementation == "eager", part.name
            assert module.config_class.model_type == part.module.model_type
        assert (part.module.tokenizer is not None) == part.name.startswith("text_encoder"), part.name
        processors = [own.processor for own in module.modules() if getattr(own, "processor", None) is not None]
        left = [type(own).__name__ for own in processors if "2_0" in type(own).__name__]
        assert left == [], part.name
        assert all(own.how.eager for own in processors if hasattr(own, "how")), part.name
        resolve_name(part.module.recompute)
        if part.name == "vae":
            resolve_name(part.module.tile)(module, 64, None)
            assert module.use_tiling


def test_no_class_is_named_where_no_part_is() -> None:
    """Names of classes stand in specs, in what writes tiny models, and in parts/classes.py."""
    names = {part.module.name for _, part in PARTS}
    found = []
    for file in sorted((ROOT / "runner").rglob("*.py")):
        place = file.relative_to(ROOT / "runner").as_posix()
        if place.startswith("families/") and (file.name in ("spec.py", "classes.py") and place != "families/spec.py"):
            continue
        texts = [node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)]
        found += [f"{place}: {text}" for text in texts if text in names]
    assert found == []


def test_attention_of_an_unknown_kind_is_not_left_as_it_is() -> None:
    module = nn.Module()
    module.inner = nn.Module()
    module.inner.processor = object()  # type: ignore[assignment]
    diffusers_attention(module, Attention())
    with pytest.raises(TypeError, match=r"^inner: nothing says how object computes the plain formula$"):
        diffusers_attention(module, Attention(eager=True))


# --- a class that no library has --------------------------------------------------------------------------------------


class Own(nn.Module):
    def __init__(self, width: int, doubled: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.register_buffer("angles", torch.zeros(width), persistent=False)
        self.factor = 2.0 if doubled else 1.0


def build(kind: ModuleClass, config: dict[str, Any]) -> Own:
    return Own(config["width"], config["doubled"])


def finish(module: Own, options: LoadOptions) -> None:
    module.angles = torch.ones(module.first.in_features, device=options.device)


def attention(module: Own, how: Attention) -> None:
    module.how = how  # type: ignore[assignment]


def layers(config: Any) -> list[Layer]:
    return [
        Layer(name="first", original="one", kind="linear", inputs=config["width"], outputs=config["width"], bias=False)
    ]


OWN = ModuleClass(
    name="Own",
    layers=layers,
    build="tests.test_parts:build",
    settings={"doubled": True},
    tied={"last.weight": "first.weight"},
    finish="tests.test_parts:finish",
    attention="tests.test_parts:attention",
    old_names={"eldest": "first"},
)


def loaded(folder: Path, kind: ModuleClass, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    save_file({"one.weight": weight}, folder / "x.safetensors")
    component = Component(
        name="denoiser",
        weights=(folder / "x.safetensors",),
        files=(),
        layout="original",
        config={"width": 4},
        parameters=16,
        keys={"first.weight": Origin(key="one.weight")},
    )
    model = Model(
        family="own",
        components={"denoiser": component},
        tokenizers={},
        tokenizer_files=(),
        scheduler={},
        native_size=64,
        latent_factor=8,
        latent_channels=4,
        bucket_step=8,
        size_multiple=8,
        text_tokens=77,
        text_width=4,
        text_extra=0,
        label="x",
    )
    options = LoadOptions(dtype=dtype, device=torch.device("cpu"), attention="eager", split_attention=True)
    part = Part(name="denoiser", folder="transformer", module=kind, namings=(Naming(""),))
    return load_part(part, model, options), weight


def test_a_part_makes_a_class_of_its_own(tmp_path: Path) -> None:
    module, weight = loaded(tmp_path, OWN)
    assert isinstance(module, Own)
    assert module.factor == 2.0
    torch.testing.assert_close(module.first.weight.detach(), weight)
    assert module.last.weight is module.first.weight
    torch.testing.assert_close(module.angles, torch.ones(4))
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert module.how == Attention(eager=True, split=True)


def test_what_overflows_in_fp16_stays_wide(tmp_path: Path) -> None:
    module, _ = loaded(tmp_path, replace(OWN, float32=re.compile("^first")), torch.float16)
    assert module.first.weight.dtype == torch.float32
    module, _ = loaded(tmp_path, replace(OWN, float32=re.compile("^second")), torch.float16)
    assert module.first.weight.dtype == torch.float16


def test_what_no_file_holds_must_be_made(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"^angles of Own is in no file, and its `finish` does not make it$"):
        loaded(tmp_path, replace(OWN, finish=None))


def test_older_names_are_found() -> None:
    part = Part(name="denoiser", folder="transformer", module=OWN, namings=(Naming("", "diffusers"),))
    assert match_part(part, {"width": 4}, {"eldest.weight": ("F32", (4, 4))}).keys == {
        "first.weight": Origin(key="eldest.weight")
    }
    assert match_part(part, {"width": 4}, {"youngest.weight": ("F32", (4, 4))}).keys == {}
