"""Precision: names → dtypes, automatic mixed precision, and the loss scaler for fp16.

accelerate's own mixed precision is not used: it has no scaler for a CPU, and it patches the module's forward, while
samples made in training and by `runner sample` must go through exactly the same calls.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def autocast(mixed_precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context of a forward pass; none for "no"."""
    if mixed_precision == "no":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[mixed_precision])


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast narrows to where it is on; PyTorch's meta device knows none."""
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Without automatic mixed precision, inside it too; PyTorch's meta device knows none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def scaler(mixed_precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss so that fp16 gradients do not vanish; does nothing otherwise."""
    return torch.amp.GradScaler(device.type, enabled=mixed_precision == "fp16")
