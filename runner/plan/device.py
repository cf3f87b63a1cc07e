"""Whether there is a GPU, as far as can be told without torch."""

from __future__ import annotations

import glob
import os


def has_gpu() -> bool:
    """Whether the NVIDIA driver shows a device and it is not hidden from this process."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return False
    if os.name == "nt":
        return os.path.exists(os.path.join(os.environ.get("SYSTEMROOT", r"C:\Windows"), "System32", "nvcuda.dll"))
    return bool(glob.glob("/dev/nvidia[0-9]*"))
