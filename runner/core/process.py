"""Settings of the process itself: environment before torch is imported, threads, determinism, the device."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Of malloc.h."""


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

    _keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cuda.matmul.allow_tf32 = not deterministic
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # only costs time
    return torch.get_num_threads()


def _keep_freed_memory() -> None:
    """Has glibc's malloc keep freed blocks for the next tensors.

    It would give every block of more than 32 MB back at once, and the kernel would clear its pages anew for the next
    one: a quarter of a training step's time on a CPU, a third of encoding pictures. Elsewhere nothing is done.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def give_back_memory() -> None:
    """Gives what was freed and kept back to the system: after a stage, a phase, a model."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
    except (OSError, TypeError):  # Windows
        return None
