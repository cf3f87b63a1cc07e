"""What run.toml says of the noise against what the checkpoint says; torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from runner.config.prompt_options import PURE_NOISE_SAMPLERS, pure_noise_problem
from runner.config.source import Source
from runner.errors import Diagnostic
from runner.families.prompts import pure_noise
from runner.model.model import Model
from schemas import RunConfig

_ZERO_SNR = ("training", "loss", "zero_terminal_snr")


def noise_findings(config: RunConfig, resolved: RunConfig, model: Model, source: Source) -> Iterator[Diagnostic]:
    """`config` is what run.toml says, `resolved` with everything derived. Raises nothing; yields errors and warnings."""
    for dotted, stated in model.stated.items():
        path = tuple(dotted.split("."))
        given = _at(config, path)
        if given is not None and given != stated.value:
            yield Diagnostic(
                f"{dotted} = {_toml(given)}, but {stated.why} says {_toml(stated.value)}",
                source.value_places(path),
                "run.toml is followed; take the key out to follow the checkpoint",
                "warning",
            )
    if not resolved.training.loss.zero_terminal_snr:
        return
    if resolved.model.prediction_type == "epsilon" and config.model.prediction_type is None:
        yield Diagnostic(
            "zero_terminal_snr makes the last step pure noise, from which epsilon cannot be learned, and nothing says that "
            "the checkpoint predicts v",
            source.key_places(_ZERO_SNR),
            'use prediction_type = "v_prediction", or take it out',
        )
    why, sampler = pure_noise(resolved, model), config.sampling.sampler
    if config.training.loss.zero_terminal_snr is None and why and sampler and sampler not in PURE_NOISE_SAMPLERS:
        message, hint = pure_noise_problem(sampler, why)
        yield Diagnostic(message, source.value_places(("sampling", "sampler")), hint)


def _at(config: RunConfig, path: tuple[str, ...]) -> Any:
    found: Any = config
    for name in path:
        found = getattr(found, name)
    return found


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"'
