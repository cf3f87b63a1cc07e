"""Noise processes: the discrete one of DDPM (arXiv 2006.11239) with its variants of target, and rectified flow.

DDPM:  x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps;   SNR_t = abar_t / (1 - abar_t);   t is an integer in 0..T-1
Flow:  x_t = (1 - sigma) x_0 + sigma eps;   target eps - x_0;   t = 1000 sigma is any number in 0..1000 (arXiv 2403.03206)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Noisy:
    """A training example: the noisy latents, what the denoiser should answer, the signal-to-noise ratio [B], and the
    timestep that the denoiser is told [B]."""

    x_t: Tensor
    target: Tensor
    snr: Tensor
    t: Tensor


class Process(Protocol):
    """What training and scoring need of a noise process."""

    @property
    def prediction_type(self) -> str:
        """ "epsilon", "v_prediction" or "flow"."""
        ...

    @property
    def num_timesteps(self) -> int: ...

    def on(self, device: torch.device) -> Process:
        """The same with its tables there, so that no step waits for a copy of them."""
        ...

    def noisy(self, x_0: Tensor, noise: Tensor, t: Tensor, input_noise: Tensor | None = None) -> Noisy:
        """x_0 and noise [B, …] in fp32, t [B]. `input_noise` goes into x_t alone (input perturbation)."""
        ...


@dataclass(frozen=True)
class DiscreteProcess:
    """alphas_cumprod [T] in fp32 and the kind of prediction ("epsilon" or "v_prediction")."""

    alphas_cumprod: Tensor
    prediction_type: str

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def on(self, device: torch.device) -> DiscreteProcess:
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def noisy(self, x_0: Tensor, noise: Tensor, t: Tensor, input_noise: Tensor | None = None) -> Noisy:
        abar = self.alphas_cumprod[t]
        signal = abar.sqrt().view(-1, *[1] * (x_0.dim() - 1))
        spread = (1 - abar).sqrt().view(-1, *[1] * (x_0.dim() - 1))
        x_t = signal * x_0 + spread * (noise if input_noise is None else input_noise)
        target = noise if self.prediction_type == "epsilon" else signal * noise - spread * x_0
        return Noisy(x_t, target, abar / (1 - abar), t)


@dataclass(frozen=True)
class FlowProcess:
    """Straight paths from data to noise; the denoiser answers their velocity."""

    prediction_type: str = "flow"
    num_timesteps: int = 1000
    offset: float = 0.0
    """What is added to the timestep that the denoiser is told in training (HunyuanVideo's: 1)."""

    def on(self, device: torch.device) -> FlowProcess:
        return self

    def noisy(self, x_0: Tensor, noise: Tensor, t: Tensor, input_noise: Tensor | None = None) -> Noisy:
        sigma = (t.to(x_0.device, torch.float32) / self.num_timesteps).clamp(0, 1)
        wide = sigma.view(-1, *[1] * (x_0.dim() - 1))
        x_t = (1 - wide) * x_0 + wide * (noise if input_noise is None else input_noise)
        snr = ((1 - sigma) / sigma.clamp(min=1e-6)) ** 2
        return Noisy(x_t, noise - x_0, snr, t.to(x_0.device) + self.offset if self.offset else t)


def make_process(schedule: Mapping[str, Any], prediction_type: str, zero_terminal_snr: bool) -> DiscreteProcess:
    """From a diffusers scheduler configuration. Raises `ValueError` for a schedule of betas that is not known."""
    count = schedule.get("num_train_timesteps") or 1000
    start, end = schedule.get("beta_start") or 0.0001, schedule.get("beta_end") or 0.02
    kind = schedule.get("beta_schedule") or "linear"
    if schedule.get("trained_betas") is not None:
        betas = torch.tensor(schedule["trained_betas"], dtype=torch.float32)
    elif kind == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float32)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    else:
        raise ValueError(f"the checkpoint's beta_schedule is {kind!r}; linear and scaled_linear are known")
    abar = torch.cumprod(1.0 - betas, dim=0)
    return DiscreteProcess(rescale_zero_terminal_snr(abar) if zero_terminal_snr else abar, prediction_type)


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Algorithm 1 of arXiv 2305.08891: shifts and scales sqrt(abar) so that the last is 0 and the first stays."""
    root = alphas_cumprod.sqrt()
    first, last = root[0].clone(), root[-1].clone()
    return ((root - last) * (first / (first - last))) ** 2
