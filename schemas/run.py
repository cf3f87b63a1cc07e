"""[run]: the run's name, place, seed and device."""

from __future__ import annotations

from schemas.base import FilePath, Section, key


class Run(Section):
    """The run's name, place, seed and device."""

    name: str = key(effect="none", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Name of the run; its folder, its files and its published weights are called so. Letters, digits, `.`, `_`, `-`."""

    output_dir: FilePath | None = key(None, effect="none")
    """The folder that people look into: checkpoints, samples, logs, strip, report. Unset: `runs/<name>` beside run.toml."""

    seed: int = key(42, effect="trajectory", stage="train", ge=0, le=2**32 - 1)
    """Seed of every random draw. The same seed, file and machine give the same bytes."""

    deterministic: bool = key(True, effect="bits", stage="train")
    """true: PyTorch's deterministic algorithms, so that two applies give equal bytes. false: faster kernels are allowed, and the lock says so."""

    device: str = key("auto", effect="none", pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$")
    """"auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N"."""
