"""Full-size checkpoints with random weights, for slow tests and benchmarks: the real key lists, no download.

python -m tests.full_size FILE.safetensors|FILE.ckpt [--family sdxl] [--without t5xxl] [--extras] [--dtype fp16]
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import click
import torch
from torch import Tensor

from tests.stand_in import KEY_LISTS

DATA = Path(__file__).resolve().parent / "data"
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def random_tensor(key: str, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Norm scales are one, biases zero, weights small enough for activations to stay finite."""
    if key.endswith(".bias"):
        return torch.zeros(shape, dtype=dtype)
    if len(shape) < 2:
        return torch.ones(shape, dtype=dtype)
    fan_in = math.prod(shape[1:])
    return (torch.randn(shape, generator=generator) * (0.5 / math.sqrt(fan_in))).to(dtype)


def random_state(family: str, without: tuple[str, ...] = (), dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Every key of the original checkpoint, less those that contain one of `without`."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, list[int]] = json.loads((DATA / f"{KEY_LISTS[family]}.json").read_text())
    return {
        key: random_tensor(key, tuple(shape), generator, dtype)
        for key, shape in shapes.items()
        if not any(part in key for part in without)
    }


def sd15_state(extras: bool = False, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Every key of the original checkpoint; with `extras` also what such files carry besides the model's weights."""
    state = random_state("sd15", (), dtype)
    position_ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    state.pop(position_ids, None)
    if extras:
        state[position_ids] = torch.arange(77).expand(1, -1).clone()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        state["betas"] = betas.float()
        state["alphas_cumprod"] = torch.cumprod(1 - betas, 0).float()
        state["model_ema.decay"] = torch.tensor(0.9999)
        state["model_ema.num_updates"] = torch.tensor(7)
        for key in [key for key in state if key.startswith("model.diffusion_model.")]:
            state["model_ema." + key.removeprefix("model.").replace(".", "")] = torch.zeros(1, dtype=dtype)
    return state


def write_sd15(path: Path, extras: bool = False, dtype: torch.dtype = torch.float16) -> Path:
    """Writes a .safetensors, or a .ckpt as Lightning does: {"state_dict": …, "global_step": …}."""
    state = sd15_state(extras, dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".ckpt":
        torch.save({"state_dict": state, "global_step": 1, "epoch": 0}, path)
    else:
        from safetensors.torch import save_file

        save_file(state, str(path), metadata={"format": "pt"})
    return path


def write_full(path: Path, family: str, without: tuple[str, ...] = ()) -> Path:
    """Writes a random checkpoint of a family in fp16."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(random_state(family, without), str(path), metadata={"format": "pt"})
    return path


@click.command(help=__doc__)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--family", type=click.Choice(list(KEY_LISTS)), default="sd15")
@click.option("--without", multiple=True)
@click.option("--extras", is_flag=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="fp16")
def main(path: Path, family: str, without: tuple[str, ...], extras: bool, dtype: str) -> None:
    if family == "sd15":
        write_sd15(path, extras, DTYPES[dtype])
    else:
        write_full(path, family, without)


if __name__ == "__main__":
    main()
