"""The shapes in a PyTorch zip archive, read without torch and without running anything from the file.

A restricted unpickler knows the few names that a state dict needs and builds inert records in their place; any other
name is refused. Weights are loaded later by `torch.load(weights_only=True)`, which is as strict.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runner.errors import Invalid

MAX_PICKLE_BYTES = 200_000_000
_STORAGES = {
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "Float8_e4m3fnStorage": "F8_E4M3", "Float8_e5m2Storage": "F8_E5M2",
}  # fmt: skip


class _Tensor:
    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        self.dtype = dtype
        self.shape = shape


def _rebuild_tensor(storage: str, _offset: int, size: tuple[int, ...], *_: Any) -> _Tensor:
    return _Tensor(storage, tuple(int(side) for side in size))


def _rebuild_parameter(data: _Tensor, *_: Any) -> _Tensor:
    return data


class _ShapesOnly(pickle.Unpickler):
    """Resolves only the names of state dicts; storages become the names of their dtypes."""

    _known: dict[tuple[str, str], Callable[..., Any] | type] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        ("torch", "Size"): tuple,
    }

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        found = self._known.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> str:
        if isinstance(pid, tuple) and len(pid) > 1 and pid[0] == "storage" and isinstance(pid[1], str):
            return pid[1]
        raise pickle.UnpicklingError("an unknown kind of storage")


def read_pickle_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Key → (dtype, shape) of the state dict in a .ckpt or .pt; looks inside `state_dict` and `module`. Raises `Invalid`."""
    convert = "convert it to .safetensors, or get a file that holds weights only"
    try:
        with zipfile.ZipFile(file) as archive:
            name = next((entry for entry in archive.namelist() if entry.endswith("/data.pkl")), None)
            if name is None or archive.getinfo(name).file_size > MAX_PICKLE_BYTES:
                raise Invalid(f"{file} is no PyTorch checkpoint", hint=convert)
            content = _ShapesOnly(io.BytesIO(archive.read(name))).load()
    except OSError as error:
        raise Invalid(f"{file} cannot be read: {error.strerror or error}") from None
    except zipfile.BadZipFile:
        raise Invalid(f"{file} is no PyTorch checkpoint of the zip format, or it is cut off", hint=convert) from None
    except (pickle.UnpicklingError, TypeError, ValueError, EOFError, AttributeError, IndexError, KeyError) as error:
        raise Invalid(f"{file} holds more than weights ({error}); it is not opened", hint=convert) from None
    for wrapper in ("state_dict", "module"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise Invalid(f"{file} holds no state dict", hint=convert)
    return {str(key): (value.dtype, value.shape) for key, value in content.items() if isinstance(value, _Tensor)}
