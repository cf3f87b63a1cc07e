"""The optimizers by name: their classes, what they take, and what they keep; torch-free, so that planning can check it.

A test compares the table with the classes.
"""

from __future__ import annotations

import importlib.metadata
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CLASS_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


@dataclass(frozen=True, kw_only=True)
class Argument:
    """What an argument of an optimizer or a schedule may be. `above` and `below` are excluded bounds."""

    type: type
    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    @property
    def words(self) -> str:
        """`an integer, at least 1`."""
        named = {bool: "true or false", int: "an integer", float: "a number"}[self.type]
        bounds = (("at least", self.least), ("above", self.above), ("at most", self.most), ("below", self.below))
        said = " and ".join(f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound))
        return f"{named}, {said}" if said else named

    def takes(self, value: Any) -> bool:
        if self.type is bool or isinstance(value, bool):
            return self.type is bool and isinstance(value, bool)
        if not isinstance(value, int) and not (self.type is float and isinstance(value, float)):
            return False
        return self.least <= value <= self.most and self.above < value < self.below


_SWITCH, _SHARE, _COUNT = (
    Argument(type=bool),
    Argument(type=float, least=0, below=1),
    Argument(type=int, least=0, most=10**12),
)
_POSITIVE = Argument(type=float, above=0)
_BNB = {"min_8bit_size": _COUNT, "is_paged": _SWITCH}


@dataclass(frozen=True, kw_only=True)
class OptimizerKind:
    """An optimizer: `address` is module:Class, `package` what has to be installed for it.

    `defaults` are betas, eps and weight_decay as its field uses them; a name that is not there is not taken.
    `state_bytes` are kept for one trained number.
    """

    address: str
    defaults: Mapping[str, Any]
    args: Mapping[str, Argument]
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
        address="torch.optim:AdamW",
        defaults=_ADAM,
        args={"amsgrad": _SWITCH, "maximize": _SWITCH, "foreach": _SWITCH, "fused": _SWITCH},
        state_bytes=8.0,
    ),
    "adamw8bit": OptimizerKind(
        address="bitsandbytes.optim:AdamW8bit",
        defaults=_ADAM,
        args={"amsgrad": _SWITCH, **_BNB},
        state_bytes=2.1,
        package="bitsandbytes",
    ),
    "paged_adamw8bit": OptimizerKind(
        address="bitsandbytes.optim:PagedAdamW8bit",
        defaults=_ADAM,
        args={"amsgrad": _SWITCH, "min_8bit_size": _COUNT},
        state_bytes=2.1,
        package="bitsandbytes",
    ),
    "lion": OptimizerKind(
        address="bitsandbytes.optim:Lion", defaults=_LION, args=_BNB, state_bytes=4.0, package="bitsandbytes"
    ),
    "lion8bit": OptimizerKind(
        address="bitsandbytes.optim:Lion8bit", defaults=_LION, args=_BNB, state_bytes=1.05, package="bitsandbytes"
    ),
    "adafactor": OptimizerKind(
        address="transformers.optimization:Adafactor",
        defaults={"weight_decay": 0.0},
        args={
            "clip_threshold": _POSITIVE,
            "decay_rate": Argument(type=float, least=-1, below=0),
            "beta1": _SHARE,
            "scale_parameter": _SWITCH,
            "relative_step": _SWITCH,
            "warmup_init": _SWITCH,
        },
        state_bytes=0.1,
        fixed={"scale_parameter": False, "relative_step": False, "warmup_init": False},
    ),
    "prodigy": OptimizerKind(
        address="prodigyopt:Prodigy",
        defaults={**_ADAM, "weight_decay": 0.0},
        args={
            "beta3": _SHARE,
            "decouple": _SWITCH,
            "use_bias_correction": _SWITCH,
            "safeguard_warmup": _SWITCH,
            "d0": _POSITIVE,
            "d_coef": _POSITIVE,
            "growth_rate": Argument(type=float, least=1),
            "slice_p": Argument(type=int, least=1, most=10**6),
        },
        state_bytes=16.0,
        package="prodigyopt",
        one_rate=True,
    ),
    "schedule_free_adamw": OptimizerKind(
        address="schedulefree:AdamWScheduleFree",
        defaults=_ADAM,
        args={
            "warmup_steps": _COUNT,
            "r": Argument(type=float, least=0),
            "weight_lr_power": Argument(type=float, least=0),
            "foreach": _SWITCH,
        },
        state_bytes=8.0,
        package="schedulefree",
    ),
    "muon": OptimizerKind(
        address="runner.optim.muon:MuonWithAdamW",
        defaults={**_ADAM, "weight_decay": 0.1},
        args={"momentum": _SHARE, "nesterov": _SWITCH, "ns_steps": Argument(type=int, least=1, most=99)},
        state_bytes=4.5,
    ),
}


_STEPS, _FACTORS = Argument(type=int, least=1), Argument(type=float, least=0)
SCHEDULES: dict[str, dict[str, Argument]] = {
    "constant": {},
    "linear": {},
    "rex": {},
    "cosine": {"num_cycles": Argument(type=float, above=0, most=1000)},
    "cosine_with_restarts": {"num_cycles": Argument(type=int, least=1, most=1000)},
    "polynomial": {"power": Argument(type=float, above=0, most=100), "lr_end": Argument(type=float, least=0)},
    "warmup_stable_decay": {
        "decay_ratio": Argument(type=float, above=0, most=1),
        "min_lr_ratio": Argument(type=float, least=0, most=1),
    },
    "piecewise": {"boundaries": _STEPS, "factors": _FACTORS},
}
"""Schedule → its arguments; those of piecewise are lists of such numbers."""
POLYNOMIAL_END = 1e-7
"""lr_end of polynomial where none is given."""


def is_schedule_free(kind: str) -> bool:
    """Whether an optimizer averages its weights in place of a schedule; of a class by full name as its name tells."""
    return kind == "schedule_free_adamw" or "schedulefree" in kind.rpartition(".")[2].lower()


def finds_rate(kind: str) -> bool:
    """Whether an optimizer estimates the distance to the solution and multiplies it by learning_rate (Prodigy,
    D-Adaptation)."""
    name = kind.rpartition(".")[2].lower()
    return "prodigy" in name or "dadapt" in name


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
