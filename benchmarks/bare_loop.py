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
    """The U-Net and what trains of it."""
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(settings["unet"], torch_dtype=torch.float32, local_files_only=True)
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
            parameter.data.copy_(start[name])
            trained.append(parameter)
    return unet, trained


def train(folder: Path) -> list[float]:
    """Trains all handed steps and returns their losses; its step times are in TIMES."""
    import torch
    from diffusers import DDPMScheduler
    from safetensors import safe_open

    settings = json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(settings["threads"])
    unet, parameters = make_model(settings, folder)
    device = next(unet.parameters()).device
    scheduler = DDPMScheduler(**settings["scheduler"])
    optimizer = torch.optim.AdamW(parameters, fused=True, **settings["optimizer"])
    losses: list[float] = []
    TIMES.clear()
    with safe_open(folder / "batches.safetensors", framework="pt", device=str(device)) as batches:
        for step in range(settings["steps"]):
            began = time.perf_counter()
            latents, noise, t, hidden = (
                batches.get_tensor(f"{step}.{name}") for name in ("latents", "noise", "timesteps", "hidden")
            )
            noisy = scheduler.add_noise(latents, noise, t)
            with torch.autocast(device.type, torch.bfloat16, enabled=settings["bf16"]):
                prediction = unet(noisy, t, encoder_hidden_states=hidden, return_dict=False)[0]
            is_v = settings["scheduler"]["prediction_type"] == "v_prediction"
            target = scheduler.get_velocity(latents, noise, t) if is_v else noise
            loss = torch.nn.functional.mse_loss(prediction.float(), target)
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


def main() -> None:
    losses = train(Path(sys.argv[1]))
    print(json.dumps({"losses": losses, "seconds": TIMES, "first_step": FIRST[0]}))


if __name__ == "__main__":
    main()
