"""Losses and their weights, each per item.

Weights: Min-SNR (arXiv 2303.09556), debiased estimation (arXiv 2310.08442), v-prediction's scalings as in sd-scripts,
and those of flow matching (arXiv 2403.03206, as `compute_loss_weighting_for_sd3` in diffusers). Pseudo-Huber losses and
their schedules as in sd-scripts' `conditional_loss` (after arXiv 2403.16728).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from schemas.training import Loss

_SNR_LIMIT = 1000.0
"""sd-scripts limits the SNR so: at timestep 0 it has no bound."""


def distance(
    prediction: Tensor,
    target: Tensor,
    loss: Loss,
    t: Tensor,
    snr: Tensor,
    num_timesteps: int,
    mask: Tensor | None = None,
) -> Tensor:
    """Mean distance of each item, fp32 [B]. `mask` [B, 1, h, w] in 0..1 weights the positions, as in sd-scripts."""
    prediction, target = prediction.float(), target.float()
    dims = list(range(1, prediction.dim()))
    if loss.type == "mse":
        found = (prediction - target) ** 2
    elif loss.type == "l1":
        found = (prediction - target).abs()
    else:
        c = huber_c(loss, t, snr, num_timesteps).view(-1, *[1] * len(dims))
        root = torch.sqrt((prediction - target) ** 2 + c**2) - c
        found = (2 * c if loss.type == "huber" else 2.0) * root
    return (found if mask is None else found * mask).mean(dims)


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
    weight = torch.ones_like(snr)
    if loss.min_snr_gamma is not None:
        clipped = snr.clamp(max=loss.min_snr_gamma)
        # At SNR 0 (zero terminal SNR) epsilon's weight would be 0 / 0; v's is 0 / 1.
        weight = clipped / (snr + 1) if prediction_type == "v_prediction" else clipped / snr.clamp(min=1e-20)
    limited = snr.clamp(max=_SNR_LIMIT)
    if loss.scale_v_pred_loss_like_noise_pred:
        weight = weight * (limited / (limited + 1))
    if loss.v_pred_like_loss > 0:
        weight = weight * (1 + loss.v_pred_like_loss * (limited + 1) / limited.clamp(min=1e-20))
    if loss.debiased_estimation:
        weight = weight * (1 / (limited + 1) if prediction_type == "v_prediction" else limited.clamp(min=1e-20).rsqrt())
    return weight


def flow_weight(weighting: str, sigma: Tensor) -> Tensor:
    """The weight of each item [B] under flow matching; sigma in 0..1."""
    if weighting == "sigma_sqrt":
        return sigma.clamp(min=1e-3) ** -2.0
    if weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return torch.ones_like(sigma)
