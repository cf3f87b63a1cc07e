"""One optimizer for each tensor: what lets a step happen inside the backward pass, keep its states on the host, and
round the result of low-precision weights stochastically.

Stochastic rounding: a bf16 weight would lose every update smaller than half of its last digit; rounding up with a
probability equal to the part that is cut off keeps them on average (arXiv 2010.06192).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runner.rng import generator

Group = dict[str, Any]


@dataclass(frozen=True)
class SingleOptions:
    """How the tensors' optimizers work. `max_norm` clips each tensor's gradient by itself; 0 is off."""

    fused_backward: bool = False
    offload: bool = False
    stochastic_rounding: bool = False
    max_norm: float = 0.0

    @property
    def needed(self) -> bool:
        return self.fused_backward or self.offload or self.stochastic_rounding


class SingleOptimizers(torch.optim.Optimizer):
    """Looks like one optimizer over the groups; `make` gives the optimizer of one group with one tensor."""

    def __init__(
        self, make: Callable[[Sequence[Group]], torch.optim.Optimizer], groups: Sequence[Group], options: SingleOptions
    ) -> None:
        self.options = options
        self.singles: list[torch.optim.Optimizer] = []
        self.param_groups = []
        self.defaults = {}
        self._places: list[int] = []
        self.rounding = (0, 0)
        """Seed and step of the draws of rounding."""
        for number, group in enumerate(groups):
            self.param_groups.append({**group, "params": list(group["params"])})
            for parameter in group["params"]:
                self.singles.append(make([{**group, "params": [parameter]}]))
                self._places.append(number)
        if options.fused_backward:
            for index, parameter in enumerate(self._parameters()):
                parameter.register_post_accumulate_grad_hook(self._hook(index))

    def singles_of(self, group: Group) -> list[torch.optim.Optimizer]:
        """The optimizers of a group's tensors."""
        number = next(number for number, own in enumerate(self.param_groups) if own is group)
        return [single for single, place in zip(self.singles, self._places, strict=True) if place == number]

    def _parameters(self) -> list[Tensor]:
        return [single.param_groups[0]["params"][0] for single in self.singles]

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        def step(parameter: Tensor) -> None:
            self._step_one(index)
            parameter.grad = None

        return step

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if not self.options.fused_backward:
            for index, parameter in enumerate(self._parameters()):
                if parameter.grad is not None:
                    self._step_one(index)

    @torch.no_grad()
    def _step_one(self, index: int) -> None:
        single, group = self.singles[index], self.param_groups[self._places[index]]
        single.param_groups[0]["lr"] = group["lr"]
        parameter = single.param_groups[0]["params"][0]
        if self.options.max_norm > 0:
            torch.nn.utils.clip_grad_norm_([parameter], self.options.max_norm)
        if self.options.offload:
            _move(single.state, parameter, parameter.device)
        if self.options.stochastic_rounding and parameter.dtype == torch.bfloat16:
            self._rounded_step(single, parameter, generator(self.rounding[0], "rounding", self.rounding[1], index))
        else:
            single.step()
        if self.options.offload:
            _move(single.state, parameter, torch.device("cpu"))

    def _rounded_step(self, single: torch.optim.Optimizer, parameter: Tensor, draws: torch.Generator) -> None:
        low, grad = parameter.data, parameter.grad
        assert grad is not None
        parameter.grad = None
        parameter.data = low.float()
        parameter.grad = grad.float()
        single.step()
        result = parameter.data
        parameter.grad = None
        parameter.data = low
        low.copy_(round_stochastically(result, draws))
        parameter.grad = grad

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self._parameters():
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        state: dict[int, Any] = {}
        groups: list[Group] = []
        for index, single in enumerate(self.singles):
            own = single.state_dict()
            if own["state"]:
                state[index] = own["state"][0]
            groups.append({**own["param_groups"][0], "params": [index]})
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for index, single in enumerate(self.singles):
            entry = state_dict["state"].get(index)
            group = {**state_dict["param_groups"][index], "params": [0]}
            single.load_state_dict({"state": {} if entry is None else {0: entry}, "param_groups": [group]})
            parameter = single.param_groups[0]["params"][0]
            if entry is not None and self.options.stochastic_rounding:  # loading casts states to the weight's dtype
                for name, value in entry.items():
                    if isinstance(value, Tensor):
                        single.state[parameter][name] = value.to(parameter.device)
            if self.options.offload:
                _move(single.state, parameter, torch.device("cpu"))


def _move(state: Any, parameter: Tensor, device: torch.device) -> None:
    """Moves the states of a tensor; to the host they go where it can be read from without a copy."""
    entry = state.get(parameter)
    if not entry:
        return
    for name, value in entry.items():
        if isinstance(value, Tensor) and value.dim() and value.device != device:
            moved = value.to(device, non_blocking=True)
            entry[name] = moved.pin_memory() if device.type == "cpu" and torch.cuda.is_available() else moved


def round_stochastically(values: Tensor, generator: torch.Generator | None) -> Tensor:
    """fp32 → bf16, up or down with a probability by nearness; the mean of the result is the value."""
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, generator=generator).to(values.device)
    return ((bits + noise) & -65536).view(torch.float32).to(torch.bfloat16)
