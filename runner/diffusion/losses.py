"""Losses and their weights, each per item.

Weights: Min-SNR (arXiv 2303.09556), debiased estimation (arXiv 2310.08442). Pseudo-Huber losses and their schedules as
in sd-scripts' `conditional_loss` (after arXiv 2403.16728).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from schemas.training import Loss


def distance(prediction: Tensor, target: Tensor, loss: Loss, t: Tensor, snr: Tensor, num_timesteps: int) -> Tensor:
    """Mean distance of each item, fp32 [B]."""
    prediction, target = prediction.float(), target.float()
    dims = list(range(1, prediction.dim()))
    if loss.type == "mse":
        return ((prediction - target) ** 2).mean(dims)
    if loss.type == "l1":
        return (prediction - target).abs().mean(dims)
    c = huber_c(loss, t, snr, num_timesteps).view(-1, *[1] * len(dims))
    root = torch.sqrt((prediction - target) ** 2 + c**2) - c
    factor = 2 * c if loss.type == "huber" else torch.tensor(2.0, device=root.device)
    return (factor * root).mean(dims)


def huber_c(loss: Loss, t: Tensor, snr: Tensor, num_timesteps: int) -> Tensor:
    """The turning point of each item [B]: constant, falling exponentially with t, or following the SNR."""
    if loss.huber_schedule == "constant":
        return torch.full_like(snr, loss.huber_c)
    if loss.huber_schedule == "exponential":
        return torch.exp(math.log(loss.huber_c) / num_timesteps * t.float())
    sigma = torch.rsqrt(snr.clamp(min=1e-20))
    return (1 - loss.huber_c) / (1 + sigma) ** 2 + loss.huber_c


def snr_weight(loss: Loss, snr: Tensor, prediction_type: str) -> Tensor:
    """The weight of each item [B]; ones where no weighting is asked for."""
    if loss.min_snr_gamma is not None:
        clipped = snr.clamp(max=loss.min_snr_gamma)
        # At SNR 0 (zero terminal SNR) epsilon's weight would be 0 / 0; v's is 0 / 1.
        return clipped / (snr + 1) if prediction_type == "v_prediction" else clipped / snr.clamp(min=1e-20)
    if loss.debiased_estimation:
        limited = snr.clamp(max=1000.0)
        return 1 / (limited + 1) if prediction_type == "v_prediction" else limited.clamp(min=1e-20).rsqrt()
    return torch.ones_like(snr)
