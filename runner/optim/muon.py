"""Muon (arXiv 2502.16982) for hidden matrices, AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class MuonWithAdamW(torch.optim.Optimizer):
    """Two-dimensional parameters go to PyTorch's Muon with AdamW's update size (`match_rms_adamw`), so that one learning
    rate serves both; others go to AdamW. A group that says `hidden: False` goes to AdamW whole."""

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
    ) -> None:
        matrices: list[dict[str, Any]] = []
        others: list[dict[str, Any]] = []
        for group in params:
            own = list(group["params"])
            hidden = group.get("hidden", True)
            for target, chosen in (
                (matrices, [p for p in own if hidden and p.dim() == 2]),
                (others, [p for p in own if not (hidden and p.dim() == 2)]),
            ):
                if chosen:
                    target.append({**{k: v for k, v in group.items() if k != "hidden"}, "params": chosen})
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(
                torch.optim.Muon(
                    matrices,
                    lr=lr,
                    weight_decay=weight_decay,
                    momentum=momentum,
                    nesterov=nesterov,
                    ns_steps=ns_steps,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if others:
            self.parts.append(
                torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
            )
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.defaults = {"lr": lr}

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        """The parts' states by parameter."""
        return {parameter: entry for part in self.parts for parameter, entry in part.state.items()}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The parts' states under one numbering."""
        state: dict[int, dict[str, Tensor]] = {}
        groups: list[dict[str, Any]] = []
        offset = 0
        for part in self.parts:
            own = part.state_dict()
            state |= {offset + index: entry for index, entry in own["state"].items()}
            groups += [{**group, "params": [offset + i for i in group["params"]]} for group in own["param_groups"]]
            offset += sum(len(group["params"]) for group in own["param_groups"])
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        offset = first = 0
        for part in self.parts:
            groups = state_dict["param_groups"][first : first + len(part.param_groups)]
            count = sum(len(group["params"]) for group in part.param_groups)
            state = {
                index - offset: entry
                for index, entry in state_dict["state"].items()
                if offset <= index < offset + count
            }
            part.load_state_dict(
                {
                    "state": state,
                    "param_groups": [{**group, "params": [i - offset for i in group["params"]]} for group in groups],
                }
            )
            offset += count
            first += len(part.param_groups)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
