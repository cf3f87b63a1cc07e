"""Settings of the process itself: environment before torch is imported, threads, determinism, the device."""

from __future__ import annotations

import os


def prepare_environment(deterministic: bool = True) -> None:
    """Must run before torch is imported.

    GOMP_SPINCOUNT: on shared cores, OpenMP threads that spin long at a barrier make a small step take seconds; threads
    that do not spin at all make it three times slower on cores of one's own.
    HF_HUB_OFFLINE: nothing is looked up on the network while running.
    """
    defaults = {
        "GOMP_SPINCOUNT": "10000",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DIFFUSERS_VERBOSITY": "error",
        "TRANSFORMERS_VERBOSITY": "error",
        "BITSANDBYTES_NOWELCOME": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    if deterministic:
        defaults["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def prepare_torch(deterministic: bool, threads: int | None = None) -> int:
    """Sets determinism and the number of CPU threads (sums depend on it; None: PyTorch's own choice); returns it.

    Operations without a deterministic kernel warn instead of failing: a run must not die of it after hours.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cuda.matmul.allow_tf32 = not deterministic
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # only costs time
    return torch.get_num_threads()
