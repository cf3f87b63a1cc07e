"""The optimizers by name: their classes, what they take, and what they keep; torch-free, so that planning can check it.

A test compares the table with the classes.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_BNB = {"min_8bit_size": int, "is_paged": bool}
CLASS_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer: `address` is module:Class, `package` what has to be installed for it.

    `defaults` are betas, eps and weight_decay as its field uses them; a name that is not there is not taken.
    `state_bytes` are kept for one trained number.
    """

    address: str
    defaults: Mapping[str, Any]
    args: Mapping[str, type]
    state_bytes: float
    package: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that make the class what its name says."""
    one_rate: bool = False
    """All components must have the same learning rate."""


_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
_LION = {"betas": (0.9, 0.99), "weight_decay": 0.01}
OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(
        "torch.optim:AdamW", _ADAM, {"amsgrad": bool, "maximize": bool, "foreach": bool, "fused": bool}, 8.0
    ),
    "adamw8bit": OptimizerKind(
        "bitsandbytes.optim:AdamW8bit", _ADAM, {"amsgrad": bool, **_BNB}, 2.1, "bitsandbytes"
    ),
    "paged_adamw8bit": OptimizerKind(
        "bitsandbytes.optim:PagedAdamW8bit", _ADAM, {"amsgrad": bool, "min_8bit_size": int}, 2.1, "bitsandbytes"
    ),
    "lion": OptimizerKind("bitsandbytes.optim:Lion", _LION, _BNB, 4.0, "bitsandbytes"),
    "lion8bit": OptimizerKind("bitsandbytes.optim:Lion8bit", _LION, _BNB, 1.05, "bitsandbytes"),
    "adafactor": OptimizerKind(
        "transformers.optimization:Adafactor", {"weight_decay": 0.0},
        {"clip_threshold": float, "decay_rate": float, "beta1": float, "scale_parameter": bool, "relative_step": bool, "warmup_init": bool},
        0.1, fixed={"scale_parameter": False, "relative_step": False, "warmup_init": False},
    ),
    "prodigy": OptimizerKind(
        "prodigyopt:Prodigy", {**_ADAM, "weight_decay": 0.0},
        {"beta3": float, "decouple": bool, "use_bias_correction": bool, "safeguard_warmup": bool, "d0": float, "d_coef": float, "growth_rate": float, "slice_p": int},
        16.0, "prodigyopt", one_rate=True,
    ),
    "schedule_free_adamw": OptimizerKind(
        "schedulefree:AdamWScheduleFree", _ADAM, {"warmup_steps": int, "r": float, "weight_lr_power": float, "foreach": bool}, 8.0,
        "schedulefree",
    ),
    "muon": OptimizerKind(
        "runner.optim.muon:MuonWithAdamW", {**_ADAM, "weight_decay": 0.1}, {"momentum": float, "nesterov": bool, "ns_steps": int}, 4.5
    ),
}  # fmt: skip


def state_bytes(kind: str) -> float:
    """Bytes of state for one trained number; of a class by full name, as of Adam's."""
    return OPTIMIZERS[kind].state_bytes if kind in OPTIMIZERS else 8.0


def class_problem(name: str) -> str | None:
    """What is wrong with an optimizer's name that is not in the table, as far as can be told without importing it."""
    if CLASS_NAME.fullmatch(name) is None:
        return f'there is no optimizer "{name}"'
    package = name.partition(".")[0]
    if package not in importlib.metadata.packages_distributions():
        return f'the package "{package}" of the optimizer "{name}" is not installed'
    return None
