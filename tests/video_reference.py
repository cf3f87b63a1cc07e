"""Runs the reference cases of the video transformers and prints the largest differences as JSON.

A program of its own: MKL rounds exp() by the kind of CPU, and a guidance of 10,000 in a sine magnifies its last bit to
4e-4 of the output. The fixtures are of MKL's portable path (MKL_CBWR=COMPATIBLE), which has to be chosen at the start.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from runner.families.framepack.transformer import Clean, FramepackTransformer
from runner.families.hunyuan_video.architecture import hunyuan_layers
from runner.families.hunyuan_video.transformer import HunyuanVideoTransformer
from runner.families.parts.attention import Attention, set_attention
from runner.families.parts.load import from_origin
from runner.model.layers import origins

DATA = Path(__file__).resolve().parent / "data"


def framepack() -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    tensors = load_file(DATA / "framepack_tiny.safetensors")
    described = json.loads((DATA / "framepack_tiny.json").read_text())
    model: Any = FramepackTransformer.from_config(described["config"])
    set_attention(model, Attention())
    model.load_state_dict({key[8:]: x for key, x in tensors.items() if key.startswith("weights.")}, strict=True)
    return model, tensors, described


def answer(model: Any, tensors: dict[str, Tensor], case: str, **changes: Tensor) -> Tensor:
    """The model's answer to a case of the fixture."""
    given = {
        key.removeprefix(f"case.{case}.in."): x for key, x in tensors.items() if key.startswith(f"case.{case}.in.")
    }
    given |= changes

    def clean(scale: str) -> Clean | None:
        name = f"clean_latents{scale}"
        index = f"clean_latent{scale}_indices"
        return Clean(given[name], given[index]) if name in given else None

    result: Tensor = model(
        given["hidden_states"],
        given["timestep"],
        given["encoder_hidden_states"],
        given["encoder_attention_mask"],
        given["pooled_projections"],
        given["guidance"],
        given["image_embeddings"],
        given["latent_indices"],
        clean(""),
        clean("_2x"),
        clean("_4x"),
    )
    return result


def main() -> None:
    found: dict[str, float] = {}
    model, tensors, described = framepack()
    for split in (False, True):
        for eager in (False, True):
            model.how.split, model.how.eager = split, eager
            with torch.no_grad():
                for case in described["cases"]:
                    difference = (answer(model, tensors, case) - tensors[f"case.{case}.out"]).abs().max()
                    found[f"{case} {'split' if split else 'whole'} {'eager' if eager else 'sdpa'}"] = float(difference)
    model.how.split = model.how.eager = False
    t = tensors["train.t"]
    noisy = (1 - t) * tensors["train.latents"] + t * tensors["train.noise"]
    prediction = answer(
        model, tensors, "i2v_pad2", hidden_states=noisy, timestep=t * 1000 + 1, guidance=torch.tensor([1000.0])
    )
    loss = ((prediction - (tensors["train.noise"] - tensors["train.latents"])) ** 2).mean()
    loss.backward()
    weight = "single_transformer_blocks.0.attn.to_q.weight"
    gradient = dict(model.named_parameters())[weight].grad
    found["training loss"] = abs(float(loss) - float(tensors["train.loss"]))
    found["training gradient"] = float((gradient - tensors[f"train.grad.{weight}"]).abs().max())
    found["hunyuan"] = hunyuan(described["config"])
    print(json.dumps(found))


def hunyuan(config: dict[str, Any]) -> float:
    tensors = load_file(DATA / "hunyuan_tiny.safetensors")
    own = {key: value for key, value in config.items() if not key.startswith(("has_", "image_proj"))}
    own["num_refiner_layers"] = 2
    model: Any = HunyuanVideoTransformer.from_config(own)
    set_attention(model, Attention())
    weights = {key[8:]: x for key, x in tensors.items() if key.startswith("weights.")}
    state = {
        name: from_origin(weights[origin.key], origin) for name, origin in origins(hunyuan_layers(own), "").items()
    }
    model.load_state_dict(state, strict=True)
    given = {key[3:]: x for key, x in tensors.items() if key.startswith("in.")}
    with torch.no_grad():
        out = model(
            given["x"],
            given["timestep"],
            given["text_states"],
            given["text_mask"],
            given["text_states_2"],
            given["guidance"],
        )
    return float((out - tensors["out"]).abs().max())


if __name__ == "__main__":
    main()
