"""Whether there is a GPU, as far as can be told without torch."""

from __future__ import annotations

import ctypes
import glob
import os
from typing import Any, NamedTuple


class Card(NamedTuple):
    """A GPU as its driver names it, and the bytes of its memory."""

    name: str
    memory: int


def has_gpu() -> bool:
    """Whether the NVIDIA driver shows a device and it is not hidden from this process."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return False
    if os.name == "nt":
        return os.path.exists(os.path.join(os.environ.get("SYSTEMROOT", r"C:\Windows"), "System32", "nvcuda.dll"))
    return bool(glob.glob("/dev/nvidia[0-9]*"))


def cards() -> list[Card]:
    """The GPUs that this process may use, as the NVIDIA driver lists them."""
    if not has_gpu():
        return []
    try:
        return listed_by(ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1"))
    except (OSError, AttributeError):  # no driver, or one without these functions
        return []


def listed_by(driver: Any) -> list[Card]:
    """What the driver's library (CUDA's driver API) says; nothing where it refuses."""
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = []
    for number in range(count.value):
        device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
        failed = (
            driver.cuDeviceGet(ctypes.byref(device), number)
            or driver.cuDeviceGetName(name, len(name), device)
            or driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        )
        if not failed:
            found.append(Card(name.value.decode("utf-8", "replace"), memory.value))
    return found
