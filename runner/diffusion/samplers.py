"""Samplers by name, through diffusers' schedulers; one loop that is the same as StableDiffusionPipeline's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor

_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++_2m_karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "dpm++_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++_sde_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
}
_KEPT = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "steps_offset",
    "clip_sample",
    "set_alpha_to_one",
    "skip_prk_steps",
    "timestep_spacing",
)
_FLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_flow_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {"use_flow_sigmas": True}),
}
"""Samplers of flow matching; the last two take its shift under another name."""
Denoise = Callable[[Tensor, Tensor], Tensor]


def make_flow_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """The diffusers scheduler of a sampler for flow matching, with the checkpoint's shift."""
    cls_name, extra = _FLOW[name]
    shift = float(config.get("shift") or 1.0)
    count = config.get("num_train_timesteps") or 1000
    if extra:
        extra = {**extra, "prediction_type": "flow_prediction", "flow_shift": shift}
    else:
        extra = {"shift": shift}
    return getattr(diffusers, cls_name)(num_train_timesteps=count, **extra)


def make_scheduler(name: str, config: Mapping[str, Any], prediction_type: str, zero_terminal_snr: bool) -> Any:
    """The diffusers scheduler of a sampler, on the checkpoint's noise schedule."""
    if prediction_type == "flow":
        return make_flow_scheduler(name, config)
    cls_name, extra = _SCHEDULERS[name]
    cls = getattr(diffusers, cls_name)
    settings = {key: config[key] for key in _KEPT if config.get(key) is not None}
    settings |= {"prediction_type": prediction_type, **extra}
    if zero_terminal_snr:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    known = inspect.signature(cls.__init__).parameters
    return cls(**{key: value for key, value in settings.items() if key in known})


def sample(
    scheduler: Any,
    denoise: Denoise,
    shape: tuple[int, ...],
    steps: int,
    cfg_scale: float,
    seed: int,
    device: torch.device,
    levels: Sequence[float] | None = None,
) -> Tensor:
    """Latents fp32 [1, C, h, w]. `denoise(x [2, …] or [1, …], t [])` answers for (negative, positive) at once, or for the
    positive alone where cfg_scale is at most 1. The noise comes from a CPU generator of `seed`. `levels` are the noise levels
    before they are shifted, where the scheduler takes any and the family's are not the scheduler's own."""
    generator = torch.Generator().manual_seed(seed)
    own = levels is not None and isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    given: dict[str, Any] = {"sigmas": levels} if own else {}
    scheduler.set_timesteps(steps, device="cpu", **given)  # it looks for its place among them at each step
    x = torch.randn(shape, generator=generator).to(device) * getattr(scheduler, "init_noise_sigma", 1.0)
    accepted = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {}
    if "eta" in accepted:
        extra["eta"] = 0.0
    if "generator" in accepted:
        extra["generator"] = generator
    guided = cfg_scale > 1
    for t in scheduler.timesteps:
        model_input = torch.cat([x, x]) if guided else x
        if hasattr(scheduler, "scale_model_input"):  # flow matching's have none
            model_input = scheduler.scale_model_input(model_input, t)
        prediction = denoise(model_input, t)
        if guided:
            negative, positive = prediction.chunk(2)
            prediction = negative + cfg_scale * (positive - negative)
        x = scheduler.step(prediction, t, x, **extra, return_dict=False)[0]
    return x
