"""Reads tensors out of weights files and writes safetensors deterministically."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from collections.abc import Mapping
from io import FileIO
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from runner.errors import Invalid, RunFailed
from runner.weights.headers import PICKLE_SUFFIXES, Header, read_safetensors_header
from runner.weights.pickles import read_pickle_header

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def read_tensors(
    file: Path,
    keys: Mapping[str, str],
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    mapped: bool = False,
) -> dict[str, Tensor]:
    """The tensors under the given keys (key in the file → name in the result), one copy each. Raises `RunFailed`.

    Safetensors are read, not mapped: the pages of a mapped file would count as this process's memory beside the copies.
    `mapped` maps those that need no copy, being of the wanted dtype and staying on the CPU: nothing is read before it is
    used. They must not be written to, and the file must stay as it is.
    """
    try:
        if file.suffix in PICKLE_SUFFIXES:
            found = _unpickled(file)
            return {name: _placed(found[key], dtype, device) for key, name in keys.items()}
        header = read_safetensors_header(file)
        if (
            mapped
            and torch.device(device).type == "cpu"
            and all(_DTYPES[header.tensors[key][0]] == dtype for key in keys)
        ):
            with safe_open(file, framework="pt", device="cpu") as archive:
                return {name: archive.get_tensor(key) for key, name in keys.items()}
        with open(file, "rb", buffering=0) as stream:
            return {name: _read(stream, header, key, dtype, device) for key, name in keys.items()}
    except (OSError, Invalid, SafetensorError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise RunFailed(f"{file} cannot be read: {error}", hint="copy or download it again") from None


def _read(stream: FileIO, header: Header, key: str, dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
    name, shape = header.tensors[key]
    tensor = torch.empty(shape, dtype=_DTYPES[name])
    if tensor.numel():
        target = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
        stream.seek(header.begins[key])
        while len(target):
            count = stream.readinto(target)
            if not count:
                raise EOFError(f"it ends inside {key}")
            target = target[count:]
    return _moved(tensor, dtype, device)


def _moved(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
    wanted = tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype
    return tensor.to(device=device, dtype=wanted)


def _placed(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
    moved = _moved(tensor, dtype, device)
    # A tensor that is still a view of the mapped file would change (or crash) with the file.
    return moved.clone() if moved.data_ptr() == tensor.data_ptr() else moved


def _unpickled(file: Path) -> dict[str, Tensor]:
    read_pickle_header(file)  # PyTorch's own reader has no bounds
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    for wrapper in ("state_dict", "module"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    return content


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file with sorted keys: equal content gives equal bytes (the library's own order is random)."""
    with open(file, "wb") as stream:
        header, ordered = _header(tensors, metadata)
        stream.write(header)
        for tensor in ordered:
            stream.write(raw_bytes(tensor))


def write_hashed_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Adds the hashes by which web UIs know a LoRA, as sd-scripts defines them: sshs_model_hash is the sha256 of the
    data behind the header, sshs_legacy_hash that of the file's bytes 0x100000 to 0x110000, first 8 digits."""
    write_tensors(file, tensors, {**metadata, "sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8})
    with open(file, "rb+") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        header = stream.read(length)
        model_hash = hashlib.file_digest(stream, "sha256").hexdigest()
        stream.seek(0x100000)
        legacy_hash = hashlib.sha256(stream.read(0x10000)).hexdigest()[:8]
        for name, value in (("sshs_model_hash", model_hash), ("sshs_legacy_hash", legacy_hash)):
            header = header.replace(f'"{name}":"{"0" * len(value)}"'.encode(), f'"{name}":"{value}"'.encode())
        stream.seek(8)
        stream.write(header)


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The same as bytes, for small files."""
    header, ordered = _header(tensors, metadata)
    return header + b"".join(raw_bytes(tensor) for tensor in ordered)


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> tuple[bytes, list[Tensor]]:
    # Larger elements first, as the format's own writer does, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    content: dict[str, object] = {}
    if metadata:
        content["__metadata__"] = dict(sorted(metadata.items()))
    offset = 0
    for name in names:
        size = tensors[name].numel() * tensors[name].element_size()
        content[name] = {
            "dtype": _NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    encoded = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded, [tensors[name] for name in names]


def raw_bytes(tensor: Tensor) -> bytes:
    """A tensor's numbers as they lie in memory, little-endian."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of names, shapes and numbers."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        hasher.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        hasher.update(raw_bytes(tensors[name]))
    return hasher.hexdigest()
