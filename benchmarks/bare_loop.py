"""The same training as a plain PyTorch loop: imports nothing of this project. What it needs lies in a folder that
benchmarks/hand_over.py wrote: settings.json, start.safetensors (the adapters' first values), batches.safetensors.

    python benchmarks/bare_loop.py FOLDER      prints {"losses": …, "seconds": …, "first_step": …} as JSON
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()


def make_model(settings: dict[str, Any], folder: Path) -> tuple[Any, list[Any]]:
    """The denoiser and what trains of it."""
    import diffusers
    import torch

    dtype = torch.bfloat16 if settings["layers"] and settings["bf16"] else torch.float32
    cls = getattr(diffusers, settings["class"])
    unet = cls.from_pretrained(settings["unet"], torch_dtype=dtype, local_files_only=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet.to(device).train()
    if not settings["layers"]:
        return unet, list(unet.parameters())
    from peft import LoraConfig
    from safetensors.torch import load_file

    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=settings["rank"], lora_alpha=settings["alpha"], target_modules=settings["layers"]))
    start = load_file(folder / "start.safetensors")
    trained = []
    for name, parameter in unet.named_parameters():
        if ".lora_" in name:
            parameter.data = start[name].to(device)
            trained.append(parameter)
    return unet, trained


def loss_of(model: Any, settings: dict[str, Any], batch: dict[str, Any], scheduler: Any) -> Any:
    """The mean squared error of one batch."""
    import torch

    latents, noise, t, hidden = (batch[name] for name in ("latents", "noise", "timesteps", "hidden"))
    dtype = torch.bfloat16 if settings["bf16"] else torch.float32
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=settings["bf16"]):
        if settings["class"] == "SD3Transformer2DModel":
            sigma = (t / 1000).view(-1, 1, 1, 1)
            noisy, target = (1 - sigma) * latents + sigma * noise, noise - latents
            pooled = batch["pooled"].to(dtype)
            prediction = model(noisy.to(dtype), hidden.to(dtype), pooled, t, return_dict=False)[0]
        else:
            noisy = scheduler.add_noise(latents, noise, t)
            is_v = settings["scheduler"]["prediction_type"] == "v_prediction"
            target = scheduler.get_velocity(latents, noise, t) if is_v else noise
            added = None
            if "pooled" in batch:
                added = {"text_embeds": batch["pooled"].to(dtype), "time_ids": batch["time_ids"].to(dtype)}
            prediction = model(noisy, t, hidden, added_cond_kwargs=added, return_dict=False)[0]
    return torch.nn.functional.mse_loss(prediction.float(), target)


def batch_of(batches: Any, step: int) -> dict[str, Any]:
    """The handed tensors of one step by name."""
    prefix = f"{step}."
    return {key.removeprefix(prefix): batches.get_tensor(key) for key in batches.keys() if key.startswith(prefix)}  # noqa: SIM118


def count_flops(model: Any, settings: dict[str, Any], folder: Path, scheduler: Any) -> None:
    """Floating-point operations of a step's forward and backward pass, into FLOPS."""
    import torch
    from safetensors import safe_open
    from torch.utils.flop_counter import FlopCounterMode

    device = next(model.parameters()).device
    with safe_open(folder / "batches.safetensors", framework="pt", device=str(device)) as batches:
        batch = batch_of(batches, 0)
    with FlopCounterMode(display=False) as counter:
        loss_of(model, settings, batch, scheduler).backward()
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize() if device.type == "cuda" else None
    FLOPS.append(counter.get_total_flops())


def train(folder: Path) -> list[float]:
    """Trains all handed steps and returns their losses; its step times are in TIMES."""
    import torch
    from diffusers import DDPMScheduler
    from safetensors import safe_open

    settings = json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(settings["threads"])
    unet, parameters = make_model(settings, folder)
    device = next(unet.parameters()).device
    scheduler = None if settings["class"] == "SD3Transformer2DModel" else DDPMScheduler(**settings["scheduler"])
    called = torch.compile(unet) if settings["compile"] else unet
    if settings["compile"]:
        count_flops(unet, settings, folder, scheduler)
    optimizer = torch.optim.AdamW(parameters, fused=True, **settings["optimizer"])
    losses: list[float] = []
    TIMES.clear()
    with safe_open(folder / "batches.safetensors", framework="pt", device=str(device)) as batches:
        for step in range(settings["steps"]):
            began = time.perf_counter()
            loss = loss_of(called, settings, batch_of(batches, step), scheduler)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            TIMES.append(time.perf_counter() - began)
            if step == 0:
                FIRST.append(time.perf_counter() - BEGAN)
    return losses


TIMES: list[float] = []
FIRST: list[float] = []
FLOPS: list[int] = []


def main() -> None:
    losses = train(Path(sys.argv[1]))
    print(json.dumps({"losses": losses, "seconds": TIMES, "first_step": FIRST[0], "flops": (FLOPS or [0])[0]}))


if __name__ == "__main__":
    main()
