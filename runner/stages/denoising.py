"""What a model's denoisers answer: the timestep of each item chooses the one that is asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from runner.families.contract import Conditioning, Family
from runner.model.model import Model


@dataclass(frozen=True)
class Denoisers:
    """The denoisers among the modules."""

    family: Family
    model: Model
    modules: Mapping[str, nn.Module]

    def __call__(self, x_t: Tensor, t: Tensor, timesteps: Iterable[float], conditioning: Conditioning) -> Tensor:
        """The prediction, of x_t's shape. `t` is what they are told; `timesteps` are the items' own, on the host, which
        choose: one for all, or one each. Items of several denoisers are computed apart and put together in order."""
        names = self.model.denoising
        if len(names) == 1:
            return self.family.denoise(self.modules[names[0]], x_t, t, conditioning)
        parts = self.model.by_denoiser(timesteps)
        if len(parts) == 1:
            return self.family.denoise(self.modules[next(iter(parts))], x_t, t, conditioning)
        answers: dict[int, Tensor] = {}
        for name, places in parts.items():
            told = {key: _rows(tensor, places) for key, tensor in conditioning.items()}
            found = self.family.denoise(self.modules[name], _rows(x_t, places), _rows(t, places), told)
            answers |= zip(places, found.unbind(0), strict=True)
        return torch.stack([answers[place] for place in range(len(x_t))])


def _rows(tensor: Tensor, places: Sequence[int]) -> Tensor:
    """Some items of a batch: by slices, which need no copy of the places to the device."""
    return torch.cat([tensor[place : place + 1] for place in places])
