"""Weights files that lie, are damaged, or were made to harm: refused in words, soon, and without the memory they ask for."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import Invalid, RunFailed
from runner.weights.headers import Header, read_header
from runner.weights.tensors import read_tensors
from tests.fuzzing import bounded, fuzz, read_or_refused

ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


def safetensors(file: Path, header: bytes, data: bytes = b"\0" * 16) -> Path:
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return file


def archive(file: Path, content: bytes, entries: dict[str, bytes] | None = None, **how: Any) -> Path:
    """A zip as PyTorch writes it, with any data.pkl."""
    with zipfile.ZipFile(file, "w", **how) as zipped:
        zipped.writestr("archive/data.pkl", content)
        for name, value in (entries or {"archive/data/0": b"\0" * 64}).items():
            zipped.writestr(name, value)
    return file


def refusal(file: Path) -> str:
    with bounded(5, 300), pytest.raises(Invalid) as caught:
        read_header(file)
    assert len(str(caught.value)) < 1000
    return str(caught.value).replace(str(file), "F")


# --- safetensors ------------------------------------------------------------------------------------------------------


def entries(**changes: Any) -> bytes:
    return json.dumps({"a": {**ENTRY, **changes}}).encode()


DIGITS = "7" * 4000
SAFETENSORS = {
    "digits of a shape": (
        entries(shape=[0]).replace(b"[0]", b"[" + ", ".join([DIGITS] * 370).encode() + b"]"),
        "malformed",
    ),
    "an integer of 5,000 digits": (
        entries(shape=[0]).replace(b"[0]", b"[" + b"1" * 5000 + b"]"),
        "more than 4,300 digits",
    ),
    "an infinite side": (entries(shape=[0]).replace(b"[0]", b"[1e999]"), "malformed"),
    "a side that is no number": (entries(shape=[0]).replace(b"[0]", b"[NaN]"), "malformed"),
    "a true side": (entries(shape=[True, 4]), "malformed"),
    "nine sides": (entries(shape=[1] * 8 + [4]), "malformed"),
    "a shape that is a text": (entries(shape="4"), "malformed"),
    "offsets that go back": (entries(data_offsets=[16, 0]), "malformed"),
    "offsets before the file": (entries(data_offsets=[-16, 0]), "malformed"),
    "three offsets": (entries(data_offsets=[0, 16, 16]), "malformed"),
    "an offset of another kind": (entries(data_offsets=[0.0, 16.0]), "malformed"),
    "a dtype that is a list": (entries(dtype=["F32"]), "malformed"),
    "an entry that is none": (b'{"a": 5}', "malformed"),
    "overlapping": (
        json.dumps({"a": ENTRY, "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}).encode(),
        "F: the tensors 'a' and 'b' lie in the same bytes",
    ),
    "the same name twice": (b'{"a": 1, "a": 2}', "a name stands twice"),
    "deep": (b"[" * 100_000, "it is nested too deeply"),
    "UTF-16": ("{}".encode("utf-16"), "it is not UTF-8"),
    "half a character": (b'{"\\ud800": {}}', "it holds half a character (a lone surrogate)"),
    "a list": (b"[]", "F is no safetensors file: its header is no table"),
    "metadata that is a number": (b'{"__metadata__": 5}', "the header's __metadata__ is no table of texts"),
    "metadata of tables": (b'{"__metadata__": {"a": {}}}', "the header's __metadata__ is no table of texts"),
    "too many tensors": (
        json.dumps({str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_001)}).encode(),
        "F: the header names 100,001 tensors; at most 100,000 are read",
    ),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors_headers_that_harm(tmp_path: Path, name: str) -> None:
    header, words = SAFETENSORS[name]
    assert words in refusal(safetensors(tmp_path / "x.safetensors", header))


def test_a_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", 2**31))
        stream.truncate(2**32)
    assert "its header would have 2,147,483,648 bytes" in refusal(file)


# --- pickles ----------------------------------------------------------------------------------------------------------


def tensor_pickle(size: bytes, stride: bytes = b"K\x01\x85", numbers: int = 16, offset: bytes = b"K\x00") -> bytes:
    """{"a": a float32 tensor} with any size and stride."""
    storage = (
        b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0"
        + b"0X\x03\0\0\0cpuJ"
        + struct.pack("<i", numbers)
        + b"tQ"
    )
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + size + stride + b"\x89}tR"
    return b"\x80\x02}X\x01\0\0\0a" + rebuilt + b"s."


def nested_keys(levels: int) -> bytes:
    """{t: 1} of a tuple whose hash takes 2 ** levels steps."""
    return (
        b"\x80\x02}K\x01" + b"\x85q\x000" + b"".join(b"h\x00h\x00\x86q\x000" for _ in range(levels)) + b"h\x00K\x01s."
    )


LONG = b"\x8b" + struct.pack("<i", 4_000_000) + b"\x7f" * 4_000_000
PICKLES = {
    "a memo index of gigabytes": (b"\x80\x02}r\xff\xff\xff\x7f.", None),
    "nested tuples as keys": (nested_keys(200), "a key that is a tuple"),
    "deep tuples": (b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"K\x01s.", "a key that is a tuple"),
    "deep lists": (b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".", "F holds no state dict"),
    "too many steps": (b"\x80\x02" + b"N0" * 250_000 + b"}.", "more than 500,000 steps"),
    "nine sides": (
        tensor_pickle(b"(" + b"K\x01" * 9 + b"t", b"(" + b"K\x01" * 9 + b"t"),
        "a tensor of more than 8 sides",
    ),
    "a side of megabytes": (tensor_pickle(LONG + b"\x85"), "a tensor with a side that none has"),
    "a negative side": (tensor_pickle(b"J\xff\xff\xff\xff\x85"), "a tensor with a side that none has"),
    "larger than its storage": (tensor_pickle(b"K\x11\x85"), "a tensor that is larger than its storage"),
    "strides out of its storage": (
        tensor_pickle(b"K\x04\x85", b"K\x06\x85"),
        "a tensor that is larger than its storage",
    ),
    "one number a thousand times": (
        tensor_pickle(b"M\xe8\x03\x85", b"K\x00\x85"),
        "a tensor that is larger than its storage",
    ),
    "an offset behind it": (tensor_pickle(b"K\x01\x85", offset=b"K\x10"), "a tensor that is larger than its storage"),
    "a storage longer than its entry": (
        tensor_pickle(b"K\x01\x85", numbers=17),
        "the storage 0 is shorter than it says",
    ),
    "arguments without end": (
        b"\x80\x02(" + b"N" * 300_000 + b"tq\x000" + b"ccollections\nOrderedDict\nh\x00R0" * 50_000 + b"}.",
        "an unknown kind of dict",
    ),
    "an integer of 5,000 digits": (b"\x80\x02L" + b"1" * 5000 + b"L\n.", "more than 4,300 digits"),
    "a text longer than the file": (b"\x80\x02X\xff\xff\xff\x7fabc.", "expected 2147483647 bytes"),
    "a frame longer than the file": (b"\x80\x04\x95" + b"\xff" * 8 + b"}.", None),
    "no end": (b"\x80\x02}", "pickle exhausted before seeing STOP"),
    "nothing": (b"", "pickle exhausted before seeing STOP"),
    "code": (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
    "code in an instance": (b"(S'true'\nios\nsystem\n.", "the opcode INST"),
    "a copy": (b"}22222.", "the opcode DUP"),
    "a mark that is missing": (b"tt.", "pop from empty list"),
    "a dict that is a number": (b"K\x01K\x01K\x01s.", "its records are out of order"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_harm(tmp_path: Path, name: str) -> None:
    content, words = PICKLES[name]
    file = archive(tmp_path / "x.ckpt", content)
    if words is None:  # odd, and harmless
        with bounded(5, 300):
            assert read_header(file) == Header({})
        return
    assert words in refusal(file)
    with bounded(10, 300), pytest.raises(RunFailed):
        read_tensors(file, {"a": "a"}, None)


def test_a_good_pickle_of_the_same_kind_is_read(tmp_path: Path) -> None:
    file = archive(tmp_path / "x.ckpt", tensor_pickle(b"K\x04K\x04\x86", b"K\x04K\x01\x86"))
    assert read_header(file) == Header({"a": ("F32", (4, 4))})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_of_each_protocol_and_of_odd_tensors(tmp_path: Path, protocol: int) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    state = {
        "a": whole,
        "b": whole[1:3, ::2].t(),
        "none": torch.zeros(0, 3),
        "p": torch.nn.Parameter(torch.zeros(2)),
        "linear": torch.nn.Linear(3, 2).state_dict(),
        "n": [1, 2.5, None, True, ("x", "y")],
        3: {"deep": {"er": 1}},
    }
    torch.save(state, tmp_path / "x.pt", pickle_protocol=protocol)
    assert read_header(tmp_path / "x.pt").tensors == {
        "a": ("F32", (4, 6)),
        "b": ("F32", (3, 2)),
        "none": ("F32", (0, 3)),
        "p": ("F32", (2,)),
    }


def test_zips_that_pytorch_does_not_write(tmp_path: Path) -> None:
    good, file = tensor_pickle(b"K\x04\x85"), tmp_path / "x.ckpt"
    odd = "F is no PyTorch checkpoint of the zip format, or it is cut off"
    packed = "(it is compressed or encrypted, which PyTorch's archives are not)"
    assert refusal(archive(file, good, compression=zipfile.ZIP_DEFLATED)) == f"{odd} {packed}"
    assert refusal(archive(file, good, {"archive/DATA.pkl": b""})) == f"{odd} (two of its entries have the same name)"
    plain = archive(file, good).read_bytes()
    at = plain.index(b"PK\1\2")
    file.write_bytes(plain[: at + 8] + b"\1" + plain[at + 9 :])  # the bit that says "encrypted"
    assert refusal(file) == f"{odd} {packed}"
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("archive/version", "3")
    assert refusal(file) == f"{odd} (it has no data.pkl)"
    with zipfile.ZipFile(file, "w"):
        pass
    assert refusal(file) == f"{odd} (it has no data.pkl)"
    file.write_bytes(plain[:-30])
    assert refusal(file) == f"{odd} (the list of its entries is missing)"
    file.write_bytes(pickle.dumps({}, protocol=2))
    assert refusal(file) == f"{odd} (the list of its entries is missing)"


def test_a_zip_with_a_list_of_gigabytes(tmp_path: Path) -> None:
    """The list of entries is bounded before it is read: also one that the 64-bit record tells of."""
    file = tmp_path / "x.ckpt"
    with open(file, "wb") as stream:
        stream.truncate(2**33)
        stream.seek(2**33)
        large = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 10**8, 10**8, 2**32, 100)
        stream.write(large + struct.pack("<4sLQL", b"PK\6\7", 0, 2**33, 1))
        stream.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))
    assert "it would have 100,000,000 entries in a list of 4,294,967,296 bytes" in refusal(file)


# --- anything ---------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "X"]) | JSON,
        "shape": st.lists(st.integers(-1, 2**60), max_size=10) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40), max_size=3) | JSON,
    }
)


@fuzz(60)
@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), TENSOR | JSON, max_size=3))
def test_any_safetensors_header(tmp_path: Path, header: dict[str, Any]) -> None:
    file = safetensors(tmp_path / "x.safetensors", json.dumps(header).encode())
    found = read_or_refused(lambda: read_header(file))
    for key in found.tensors if found is not None else ():
        read_or_refused(lambda key=key: read_tensors(file, {key: key}, None))  # type: ignore[misc]


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Some bytes changed, taken out or put in."""
    out = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(out) - 1)))
        how = draw(st.sampled_from(["change", "cut", "insert", "repeat"]))
        if how == "change" and out:
            out[at] = draw(st.integers(0, 255))
        elif how == "cut":
            del out[at : at + draw(st.integers(1, 8))]
        elif how == "insert":
            out[at:at] = draw(st.binary(min_size=1, max_size=6))
        else:
            out[at:at] = out[at : at + draw(st.integers(1, 40))] * draw(st.integers(1, 30))
    return bytes(out)


def saved() -> bytes:
    stream = io.BytesIO()
    torch.save({"state_dict": torch.nn.Linear(3, 2).state_dict(), "epoch": 3, "x": [1, "y", None]}, stream)
    return stream.getvalue()


SAVED = saved()
with zipfile.ZipFile(io.BytesIO(SAVED)) as _zipped:
    DATA_PKL = _zipped.read("archive/data.pkl")


@fuzz(150)
@given(damaged(DATA_PKL) | st.binary(max_size=60))
def test_any_pickle(tmp_path: Path, content: bytes) -> None:
    file = archive(tmp_path / "x.ckpt", content, {"archive/data/0": b"\0" * 24, "archive/data/1": b"\0" * 8})
    read_or_refused(lambda: read_header(file))


@fuzz(100)
@given(damaged(SAVED))
def test_any_zip(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.ckpt"
    file.write_bytes(content)
    found = read_or_refused(lambda: read_header(file))
    if found is not None and "weight" in found.tensors:
        read_or_refused(lambda: read_tensors(file, {"weight": "weight"}, None))


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (0, "the list of its entries is not where it should be"),
        (None, "it would have 1,000,000,000 entries in a list of"),
    ],
)
def test_a_list_of_entries_that_is_elsewhere_than_it_says(tmp_path: Path, place: int | None, words: str) -> None:
    """`zipfile` reads the large record right before its locator, wherever that points."""
    innocent = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 0, 0, 0, 0)
    greedy = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 10**9, 10**9, 2**40, 0)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(innocent) if place is None else place, 1)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (tmp_path / "a.pt").write_bytes(innocent + greedy + locator + end)
    assert words in refusal(tmp_path / "a.pt")
