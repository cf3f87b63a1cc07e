"""The shapes in a PyTorch zip archive, read without torch and without running anything from the file.

`pickle` itself is not used: its memo grows to any index that a file names, and it hashes whatever a file makes a key of.
Here the opcodes of a state dict, and no others, move inert records about; every count has a bound, so that the time is
linear in the file's size. Weights are loaded later by `torch.load(weights_only=True)`, and only from a file that passed.
"""

from __future__ import annotations

import pickletools
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from runner.errors import Invalid
from runner.files import open_regular, parsing

MOST_ENTRIES = 100_000
MOST_DIRECTORY_BYTES = 32 * 2**20
MOST_PICKLE_BYTES = 16 * 2**20
MOST_OPCODES = 500_000
"""Some thirty for each tensor; a full-size model with its optimizer has some thousand tensors."""
MOST_SIDES = 8
MOST_SIDE = 2**40
_LARGE = 56 + 20
"""Bytes of a large archive's record and of its locator, which stand before the record that every archive has."""
_CONVERT = "convert it to .safetensors, or get a file that holds weights only"
_STORAGES = {
    "FloatStorage": ("F32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "DoubleStorage": ("F64", 8),
    "LongStorage": ("I64", 8),
    "IntStorage": ("I32", 4),
    "ShortStorage": ("I16", 2),
    "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
    "Float8_e4m3fnStorage": ("F8_E4M3", 1),
    "Float8_e5m2Storage": ("F8_E5M2", 1),
}
"""Class of a storage → dtype and bytes of a number."""
_NAMES = {
    "collections OrderedDict": "dict",
    "torch._utils _rebuild_tensor_v2": "tensor",
    "torch._utils _rebuild_parameter": "parameter",
    "torch Size": "size",
}
_PLAIN = {
    "BININT",
    "BININT1",
    "BININT2",
    "INT",
    "LONG",
    "LONG1",
    "LONG4",
    "FLOAT",
    "BINFLOAT",
    "STRING",
    "BINSTRING",
    "SHORT_BINSTRING",
    "UNICODE",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BINBYTES",
    "SHORT_BINBYTES",
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class _Refused(ValueError):
    """The pickle holds what no state dict needs."""


@dataclass(frozen=True)
class _Name:
    """A class or function that the file names; what it stands for here."""

    kind: str
    dtype: tuple[str, int] = ("", 0)


@dataclass(frozen=True)
class _Storage:
    dtype: str
    numbers: int


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]


def read_pickle_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Key → (dtype, shape) of the state dict in a .ckpt or .pt; looks inside `state_dict` and `module`. Raises `Invalid`."""
    try:
        with open_regular(file) as stream:
            content, sizes = _data_pickle(file, stream)
    except OSError as error:
        raise Invalid(f"{file} cannot be read: {error.strerror or error}") from None
    with parsing(lambda reason: Invalid(f"{file} holds more than weights ({reason}); it is not opened", hint=_CONVERT)):
        found = _Machine(sizes).run(content)
    for wrapper in ("state_dict", "module"):
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict):
        raise Invalid(f"{file} holds no state dict", hint=_CONVERT)
    return {str(key): (value.dtype, value.shape) for key, value in found.items() if isinstance(value, _Tensor)}


def _data_pickle(file: Path, stream: BinaryIO) -> tuple[bytes, dict[str, int]]:
    """The archive's one data.pkl, and the bytes of each storage. Raises `Invalid`, `OSError`."""

    def odd(what: str) -> Invalid:
        return Invalid(f"{file} is no PyTorch checkpoint of the zip format, or it is cut off ({what})", hint=_CONVERT)

    with parsing(odd):
        try:
            length = _check_directory(stream)
            with zipfile.ZipFile(stream) as archive:
                entries = archive.infolist()
                root = entries[0].filename.split("/")[0] if entries else ""
                names = [entry.filename.lower() for entry in entries]
                if len(set(names)) < len(names):
                    raise _Refused("two of its entries have the same name")
                if any(e.compress_type or e.flag_bits & 0x41 or e.file_size != e.compress_size for e in entries):
                    raise _Refused("it is compressed or encrypted, which PyTorch's archives are not")
                if any(entry.header_offset + entry.file_size > length for entry in entries):
                    raise _Refused("an entry goes on behind its end")
                data = next((entry for entry in entries if entry.filename == f"{root}/data.pkl"), None)
                if data is None:
                    raise _Refused("it has no data.pkl")
                if data.file_size > MOST_PICKLE_BYTES:
                    raise _Refused(f"its data.pkl would have {data.file_size:,} bytes")
                inside = f"{root}/data/"
                sizes = {e.filename[len(inside) :]: e.file_size for e in entries if e.filename.startswith(inside)}
                return archive.read(data), sizes
        except (zipfile.BadZipFile, struct.error, NotImplementedError, RuntimeError) as error:
            raise odd(str(error)) from None


def _check_directory(stream: BinaryIO) -> int:
    """A bound on the zip's list of entries, which `zipfile` reads whole; the file's length."""
    length = stream.seek(0, 2)
    begin = max(0, length - 65_558 - _LARGE)
    stream.seek(begin)
    tail = stream.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < 22:
        raise _Refused("the list of its entries is missing")
    found = struct.unpack("<HI", tail[at + 10 : at + 16])
    if at >= _LARGE and tail[at - 20 : at - 16] == b"PK\6\7":
        # The large record lies where this says; but `zipfile` looks right before it.
        place = struct.unpack("<Q", tail[at - 12 : at - 4])[0]
        if place != begin + at - _LARGE:
            raise _Refused("the list of its entries is not where it should be")
        if tail[at - _LARGE : at - _LARGE + 4] == b"PK\6\6":
            found = struct.unpack("<QQ", tail[at - _LARGE + 32 : at - _LARGE + 48])
    entries, directory = found
    if entries > MOST_ENTRIES or directory > MOST_DIRECTORY_BYTES:
        raise _Refused(f"it would have {entries:,} entries in a list of {directory:,} bytes")
    return length


class _Machine:
    """Walks the opcodes of a state dict. Raises `ValueError`, `IndexError` or `TypeError` for anything else."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: bytes) -> Any:
        argument: Any
        for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if number >= MOST_OPCODES:
                raise _Refused(f"more than {MOST_OPCODES:,} steps")
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in _PLAIN:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                self.stack.append(self.memo[argument])
            elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
                self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1]
            elif name not in ("PROTO", "FRAME"):
                self._step(name, argument)
        raise _Refused("it ends too early")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name == "MARK":
            self.marks.append(stack)
            self.stack = []
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            self._replace(int(name[-1]), tuple(stack[-int(name[-1]) :]))
        elif name in ("TUPLE", "LIST", "DICT"):
            made = self._marked()
            self.stack.append(tuple(made) if name == "TUPLE" else made if name == "LIST" else _put({}, made))
        elif name in ("APPEND", "APPENDS"):
            more = self._marked() if name == "APPENDS" else [stack.pop()]
            _of(list, self.stack[-1]).extend(more)
        elif name in ("SETITEM", "SETITEMS"):
            more = self._marked() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _put(_of(dict, self.stack[-1]), more)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            named = argument if name == "GLOBAL" else " ".join((_of(str, stack.pop(-2)), _of(str, stack.pop())))
            stack.append(_named(named))
        elif name in ("REDUCE", "NEWOBJ"):
            self._replace(2, _made(_of(_Name, stack[-2]), _of(tuple, stack[-1])))
        elif name == "BUILD":  # the version numbers beside a state dict
            _of(dict, stack[-2])
            stack.pop()
        elif name == "BINPERSID":
            self._replace(1, self._storage(_of(tuple, stack[-1])))
        elif name == "POP":
            stack.pop()
        else:
            raise _Refused(f"the opcode {name}")

    def _replace(self, count: int, value: Any) -> None:
        """Takes `count` records off the stack and puts one on."""
        if len(self.stack) < count:
            raise _Refused("its records are out of order")
        self.stack[-count:] = [value]

    def _marked(self) -> list[Any]:
        """What stands above the last mark, which goes."""
        found, self.stack = self.stack, self.marks.pop()
        return found

    def _storage(self, pid: tuple[Any, ...]) -> _Storage:
        """("storage", class, name of its entry, device, how many numbers)."""
        if len(pid) != 5 or pid[0] != "storage":
            raise _Refused("an unknown kind of storage")
        _, kind, key, _, numbers = pid
        dtype, width = _of(_Name, kind).dtype
        if not width or type(numbers) is not int or not 0 <= numbers <= MOST_SIDE:
            raise _Refused("an unknown kind of storage")
        if numbers * width > self.sizes.get(_of(str, key), -1):
            raise _Refused(f"the storage {key} is shorter than it says")
        return _Storage(dtype, numbers)


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise _Refused("its records are out of order")
    return value


def _put(table: dict[Any, Any], pairs: list[Any]) -> dict[Any, Any]:
    """Keys are texts and small numbers: others could take for ever to hash."""
    for key, value in _pairs(pairs):
        if not (isinstance(key, str) or (isinstance(key, int) and key.bit_length() < 64)):
            raise _Refused(f"a key that is a {type(key).__name__.lstrip('_').lower()}")
        table[key] = value
    return table


def _pairs(flat: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(flat[::2], flat[1::2], strict=True)


def _named(name: str) -> _Name:
    module, _, last = name.rpartition(" ")
    if module == "torch" and last in _STORAGES:
        return _Name("storage", _STORAGES[last])
    if name not in _NAMES:
        raise _Refused(name.replace(" ", "."))
    return _Name(_NAMES[name])


def _made(what: _Name, arguments: tuple[Any, ...]) -> Any:
    """What the call of a known name gives."""
    if what.kind == "dict" and not arguments:
        return {}
    if what.kind == "size" and len(arguments) == 1 and isinstance(arguments[0], tuple):
        return arguments[0]
    if what.kind == "parameter" and arguments and isinstance(arguments[0], _Tensor):
        return arguments[0]
    if what.kind == "tensor" and len(arguments) >= 4 and isinstance(arguments[0], _Storage):
        storage, offset, size, strides = arguments[:4]
        shape, (begin,) = _sides(size), _sides((offset,))
        reach = begin + sum((side - 1) * step for side, step in zip(shape, _sides(strides), strict=True)) + 1
        if prod(shape) > storage.numbers or (prod(shape) and reach > storage.numbers):
            raise _Refused("a tensor that is larger than its storage")
        return _Tensor(storage.dtype, shape)
    raise _Refused(f"an unknown kind of {what.kind}")


def _sides(size: Any) -> tuple[int, ...]:
    if not isinstance(size, tuple) or len(size) > MOST_SIDES:
        raise _Refused(f"a tensor of more than {MOST_SIDES} sides")
    if not all(type(side) is int and 0 <= side <= MOST_SIDE for side in size):
        raise _Refused("a tensor with a side that none has")
    return size
