"""Builds the optimizer of a run over its parameter groups."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from pkgutil import resolve_name
from typing import Any

import torch
from torch import nn

from runner.config.optimizer_kinds import OPTIMIZERS, class_problem
from runner.errors import Invalid, RunFailed
from runner.optim.single import SingleOptimizers, SingleOptions
from schemas.training import Optimizer

Groups = Sequence[dict[str, Any]]
_HALF_AT_ZERO = (".lora_B", ".hada_w2_b", ".lokr_w1")
"""The halves of adapters that start at zero: LoRA+ gives them another learning rate."""
_NO_HIDDEN = ("conv_in", "conv_out", "embed", "proj_out.", "norm_out")
"""Parts of names of matrices that are the first or the last of their model: Muon leaves them to AdamW."""


def optimizer_class(kind: str) -> type[torch.optim.Optimizer]:
    """The class behind a name. Raises `Invalid` where there is none, `RunFailed` where its package is not installed."""
    known = OPTIMIZERS.get(kind)
    if known is None:
        return _named_class(kind)
    try:
        found: type[torch.optim.Optimizer] = resolve_name(known.address)
    except ImportError:
        raise RunFailed(
            f'optimizer "{kind}" needs the package {known.package}', hint=f'pip install {known.package}, or use "adamw"'
        ) from None
    return found


def _named_class(name: str) -> type[torch.optim.Optimizer]:
    problem = class_problem(name)
    module, _, attribute = name.rpartition(".")
    found: Any = None
    if problem is None:
        try:
            found = getattr(import_module(module), attribute, None)
        except ImportError as error:
            problem = f'the optimizer "{name}" cannot be imported: {error}'
    if problem is None and not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
        problem = f'"{name}" is no class of optimizers (torch.optim.Optimizer)'
    if problem is not None:
        raise Invalid(problem, hint="name an installed class in full: package.module.Class")
    return found


def optimizer_arguments(settings: Optimizer, cls: type[torch.optim.Optimizer]) -> dict[str, Any]:
    """What the class is called with beside its groups. Raises `Invalid` for an argument that it does not take."""
    given = {
        "betas": tuple(settings.betas) if settings.betas is not None else None,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    given = {name: value for name, value in given.items() if value is not None}
    known = OPTIMIZERS.get(settings.type)
    if known is not None:
        arguments: dict[str, Any] = {**known.fixed, **known.defaults, **given, **settings.args}
        if settings.type == "adamw" and not ({"fused", "foreach"} & settings.args.keys()):
            arguments["fused"] = True
        return arguments
    taken = inspect.signature(cls.__init__).parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
    for name in (*given, *settings.args):
        if name not in taken and not anything:
            names = ", ".join(name for name in taken if name not in ("self", "params", "args", "kwargs"))
            raise Invalid(f'the optimizer "{settings.type}" has no argument `{name}`', hint=f"it takes {names}")
    return {**given, **settings.args}


def build_optimizer(settings: Optimizer, groups: Groups, options: SingleOptions | None = None) -> torch.optim.Optimizer:
    """The optimizer over parameter groups, each with its own "lr"."""
    cls = optimizer_class(settings.type)
    make = partial(_make, settings, cls, optimizer_arguments(settings, cls))
    return SingleOptimizers(make, groups, options) if options is not None and options.needed else make(groups)


def try_optimizer(settings: Optimizer) -> None:
    """Builds it over a tensor of its own, before anything is loaded. Raises `Invalid` for what the class refuses."""
    parameter = nn.Parameter(torch.zeros(4, 4))
    build_optimizer(settings, [{"params": [parameter], "lr": 1e-4, "name": "denoiser"}])


def _make(
    settings: Optimizer, cls: type[torch.optim.Optimizer], arguments: Mapping[str, Any], groups: Groups
) -> torch.optim.Optimizer:
    own = [dict(group) for group in groups]
    if arguments.get("relative_step"):  # it finds the size of its steps itself and refuses to be told one
        own = [{name: value for name, value in group.items() if name != "lr"} for group in own]
    if settings.type != "muon":
        own = [{name: value for name, value in group.items() if name != "hidden"} for group in own]
    try:
        made = cls(own, **arguments)
    except (TypeError, ValueError) as error:
        raise Invalid(f'the optimizer "{settings.type}" refuses its arguments: {error}') from None
    for group, given in zip(made.param_groups, groups, strict=False):
        if arguments.get("relative_step"):
            group["lr"] = given["lr"]
    return made


def parameter_groups(
    parameters: Mapping[str, nn.Parameter],
    rates: Mapping[str, float],
    lora_plus_ratio: float = 1.0,
    by_place: bool = False,
) -> list[dict[str, Any]]:
    """One group for each component (the first part of a parameter's name) with its learning rate, and of LoRA+ another
    for the halves that start at zero. `by_place`: matrices at the ends of the model are in groups that say
    `hidden: False`."""
    groups: list[dict[str, Any]] = []
    for component, rate in rates.items():
        own = {name: p for name, p in parameters.items() if name.split(".", 1)[0] == component}
        sets = [("", own, rate)]
        if lora_plus_ratio != 1:
            zero = {name: p for name, p in own.items() if name.endswith(_HALF_AT_ZERO)}
            rest = {name: p for name, p in own.items() if name not in zero}
            sets = [("", rest, rate), (".plus", zero, rate * lora_plus_ratio)]
        for suffix, chosen, own_rate in sets:
            for hidden in (True, False) if by_place else (None,):
                found = [p for name, p in chosen.items() if hidden is None or _is_hidden(name) == hidden]
                if found:
                    name = component + suffix + (".ends" if hidden is False else "")
                    group = {"params": found, "lr": own_rate, "name": name}
                    groups.append(group if hidden is None else {**group, "hidden": hidden})
    return groups


def _is_hidden(name: str) -> bool:
    return not any(part in name for part in _NO_HIDDEN) or ".lora_" in name
