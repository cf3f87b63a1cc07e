"""FramePack at full size on a GPU: peak memory of each way to save it, and a step's time against a bare loop.

    python -m benchmarks.video [--only NAME …] [--steps 6] [--json FILE] [--folder DIR]
    python -m benchmarks.video --tiny          the same program on the tiny model and the CPU, to see that it runs

The weights are zeros of the real keys and shapes (a sparse file, no download): time and memory are those of real ones.
The bare loop is diffusers' transformer with peft's LoRA, the same optimizer and tensors of the same shapes; it imports
nothing of this project. Both take turns, each in a process of its own.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import tomlkit

from benchmarks.measure import GB, report, run, runner
from tests.stand_in import write_video
from tests.support import draw_clips, merged

WAYS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8_scaled": {"model": {"quantization": "fp8_scaled"}},
    "fp8_scaled, swap 36": {"model": {"quantization": "fp8_scaled"}, "training": {"memory": {"blocks_to_swap": 36}}},
    "fp8_scaled, swap 36, activations on the host": {
        "model": {"quantization": "fp8_scaled"},
        "training": {"memory": {"blocks_to_swap": 36, "activation_offload": True}},
    },
}
BARE = "bf16, bare loop"
_BARE = """
import json, sys, time
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel as Model
from peft import LoraConfig
settings = json.loads(sys.argv[1])
device = torch.device(settings["device"])
with torch.device("meta"):
    model = Model.from_config(settings["config"])
model = model.to_empty(device=device).to(torch.bfloat16 if device.type == "cuda" else torch.float32).requires_grad_(False)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.zero_()
names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "transformer_blocks" in n and ".norm" not in n]
model.add_adapter(LoraConfig(r=settings["rank"], lora_alpha=1, target_modules=names))
model.enable_gradient_checkpointing()
trained = [p for p in model.parameters() if p.requires_grad]
for parameter in trained:
    parameter.data = parameter.data.float()
if device.type == "cuda":
    from bitsandbytes.optim import AdamW8bit as Optimizer
else:
    from torch.optim import AdamW as Optimizer
optimizer = Optimizer(trained, lr=2e-4)
c, w, h, width = settings["config"]["in_channels"], settings["window"], settings["height"], settings["width"]
dtype = next(model.x_embedder.parameters()).dtype
def frames(n): return torch.randn(1, c, n, h, width, device=device, dtype=dtype)
text = torch.randn(1, 256, settings["config"]["text_embed_dim"], device=device, dtype=dtype)
mask = (torch.arange(256, device=device) < settings["text"])[None]
pooled = torch.randn(1, settings["config"]["pooled_projection_dim"], device=device, dtype=dtype)
image = torch.randn(1, settings["image_tokens"], settings["config"]["image_proj_dim"], device=device, dtype=dtype)
at = lambda first, n: torch.arange(first, first + n, device=device)
seconds = []
for step in range(settings["steps"]):
    if device.type == "cuda": torch.cuda.synchronize()
    began = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        answer = model(frames(w), torch.tensor([500.0], device=device), text, mask, pooled, image, at(1, w),
            torch.tensor([1000.0], device=device), frames(2), torch.tensor([0, w + 1], device=device), frames(2), at(w + 2, 2),
            frames(16), at(w + 4, 16), return_dict=False)[0]
    loss = ((answer.float() - torch.randn_like(answer, dtype=torch.float32)) ** 2).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step(); optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda": torch.cuda.synchronize()
    seconds.append(time.perf_counter() - began)
peak = torch.cuda.max_memory_reserved() if device.type == "cuda" else 0
print(json.dumps({"seconds": seconds, "peak": peak}))
"""


def run_toml(tiny: bool, steps: int, way: dict[str, Any]) -> dict[str, Any]:
    """A LoRA of rank 32 at 640x640 as its documentation trains it; of the tiny model at 32x32."""
    files = {
        "checkpoint": "models/FramePackI2V_HY_bf16.safetensors",
        "vae": "models/hunyuan-video-vae.safetensors",
        "text_encoder_1": "models/llava_llama3_fp16.safetensors",
        "tokenizer_1": "models/llama-tokenizer",
        "text_encoder_2": "models/clip_l.safetensors",
        "image_encoder": "models/sigclip_vision_patch14_384.safetensors",
        "text_encoder_quantization": "fp8",
    }
    model = {"checkpoint": "model", "dtype": "fp32", "latent_window_size": 2} if tiny else files
    content = {
        "schema_version": 1,
        "run": {"name": "video", "device": "cpu" if tiny else "cuda", "deterministic": False},
        "model": {"family": "framepack", **model},
        "network": {"rank": 32, "alpha": 1},
        "dataset": {
            "resolution": [32, 32] if tiny else [640, 640],
            "sources": [{"path": "clips", "kind": "video", "frame_extraction": "full"}],
        },
        "caching": {"vae_chunk_size": 32, "vae_tile_size": 128},
        "training": {
            "max_train_steps": steps,
            "learning_rate": 2e-4,
            "optimizer": {"type": "adamw" if tiny else "adamw8bit"},
            "memory": {"gradient_checkpointing": True},
            "logging": {"every_n_steps": 1, "tensorboard": False},
            "checkpoints": {"every_n_steps": steps},
        },
    }
    if tiny and "training" in way:
        way = {"training": {"memory": {name: min(value, 1) for name, value in way["training"]["memory"].items()}}}
    return merged(content, way)


def ours(folder: Path, tiny: bool, steps: int, way: dict[str, Any]) -> tuple[float, float]:
    """(median seconds of a step after the first two, peak bytes on the device) of `runner apply --target train`."""
    (folder / "run.toml").write_text(tomlkit.dumps(run_toml(tiny, steps, way)), encoding="utf-8")
    runner(folder, "apply", "--target", "train", "--yes")
    log = folder / "runs" / "video" / "logs" / "events.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    lines = [event for event in events if event["type"] == "step"][-steps:]
    times = [1 / event["steps_per_second"] for event in lines if event["steps_per_second"]]
    reserved = [
        float(event["device_bytes"]) for event in events if event["type"] == "memory" and event["stage"] == "train"
    ]
    return statistics.median(times[2:] or times), max(reserved, default=0.0)


def bare(folder: Path, tiny: bool, steps: int) -> tuple[float, float]:
    """The same of the bare loop."""
    source = folder / "model" / "transformer" / "config.json"
    if not tiny:
        from runner.families.parts.files import CONFIGS

        source = CONFIGS / "framepack" / "transformer" / "config.json"
    settings = {
        "device": "cpu" if tiny else "cuda",
        "config": json.loads(source.read_text()),
        "rank": 32,
        "steps": steps,
        "text": 20,
        "window": 2 if tiny else 9,
        "height": 4 if tiny else 80,
        "width": 4 if tiny else 80,
        "image_tokens": 4 if tiny else 729,
    }
    found = json.loads(run([sys.executable, "-c", _BARE, json.dumps(settings)], folder).out.splitlines()[-1])
    return statistics.median(found["seconds"][2:] or found["seconds"]), float(found["peak"])


@click.command(help=__doc__)
@click.option("--only", multiple=True, type=click.Choice([*WAYS, BARE]))
@click.option("--steps", default=6)
@click.option("--rounds", default=2)
@click.option("--tiny", is_flag=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
@click.option("--folder", type=click.Path(path_type=Path))
def main(only: tuple[str, ...], steps: int, rounds: int, tiny: bool, out: Path | None, folder: Path | None) -> None:
    import torch

    if not tiny and not torch.cuda.is_available():
        raise click.ClickException("there is no GPU here; --tiny shows that the program runs")
    place = folder or Path(tempfile.mkdtemp())
    size = (64, 48) if tiny else (640, 640)
    draw_clips(place / "clips", [37 if not tiny else 9], size)
    if tiny:
        from runner.families.registry import family

        family("framepack").tiny(place / "model")
    elif not (place / "models").is_dir():
        write_video(place / "models", "framepack")
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):  # they take turns
        for name in [BARE, *WAYS]:
            if not only or name in only:
                found.setdefault(name, []).append(
                    bare(place, tiny, steps) if name == BARE else ours(place, tiny, steps, WAYS[name])
                )
                steps += 1  # another length: trained anew, not extended from what is there
    reference = min(seconds for seconds, _ in found[BARE]) if BARE in found else float("nan")
    rows = []
    for name, measured in found.items():
        seconds, peak = min(seconds for seconds, _ in measured), max(peak for _, peak in measured)
        rows.append(
            {"setting": name, "step, s": seconds, "to the bare loop": seconds / reference, "peak, GB": peak / GB}
        )
    report(
        "FramePack LoRA, rank 32, 640x640, window 9" if not tiny else "the tiny model: no figure of it means anything",
        rows,
        out,
    )


if __name__ == "__main__":
    main()
