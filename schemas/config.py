"""The whole of run.toml."""

from __future__ import annotations

from typing import Literal

from schemas.base import Section, key
from schemas.caching import Caching
from schemas.dataset import Dataset
from schemas.model import Model
from schemas.network import Network
from schemas.run import Run
from schemas.sampling import Sampling
from schemas.selection import Selection
from schemas.training import Training

SCHEMA_VERSION = 1


class RunConfig(Section):
    """A run: one file, validated as a whole, compiled into cache → train → sample → select."""

    schema_version: Literal[1] = key(effect="none")
    """Version of this file's format: 1."""

    run: Run = key(effect="none")
    """The run's name, place, seed and device."""

    model: Model = key(effect="none")
    """Which model is trained."""

    network: Network | None = key(None, effect="none")
    """The adapter; leave the section out for a full fine-tune."""

    dataset: Dataset = key(effect="none")
    """Pictures and captions."""

    caching: Caching = key(default_factory=Caching, effect="none")
    """How encodings are kept."""

    training: Training = key(effect="none")
    """How it is trained."""

    sampling: Sampling = key(default_factory=Sampling, effect="none")
    """Pictures while training and for the strip."""

    selection: Selection = key(default_factory=Selection, effect="none")
    """Which checkpoint is the best, and where it goes."""
