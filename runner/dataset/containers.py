"""How many bytes a video's container says that it has. A file that broke off while it was copied or downloaded still opens
and decodes, up to where it ends, without an error; its structure tells. Sizes only: nothing is decoded; torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import BinaryIO

_BOXES = frozenset(
    b"ftyp styp moov moof mdat mfra sidx ssix free skip wide uuid meta pdin emsg prft imda udta pnot".split()
)
_SEGMENT, _CLUSTER, _EBML = 0x18538067, 0x1F43B675, 0x1A45DFA3
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_OBJECTS = (
    _ASF,
    bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c"),
    bytes.fromhex("90080033b1e5cf1189f400a0c90349cb"),
    bytes.fromhex("d329e2d6da35d111903400a0c90349be"),
)
"""The header, the data, the indexes."""


def said_bytes(stream: BinaryIO, size: int) -> int:
    """The least size of the file by what its container says; `size`, its own, where it says nothing or less."""
    head = stream.read(400)
    for fits, ends in _KINDS:
        if fits(head):
            return max((end for end in ends(stream, size)), default=0)
    return 0


def _at(stream: BinaryIO, place: int, count: int) -> bytes:
    stream.seek(place)
    return stream.read(count)


def _boxes(stream: BinaryIO, size: int) -> Iterator[int]:
    """MP4 and QuickTime: boxes of the outermost level."""
    place, fragments = 0, False
    while place < size:
        head = _at(stream, place, 16)
        if len(head) < 8:
            if fragments:
                yield place + 8
            return
        length, kind = int.from_bytes(head[:4]), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:16])
        if kind not in _BOXES or length < 8:  # what follows is no box, or the box goes on to the end
            return
        fragments = fragments or kind == b"moof"
        place += length
        yield place


def _elements(stream: BinaryIO, size: int) -> Iterator[int]:
    """Matroska and WebM: the segment; where it does not know its length, clusters and blocks."""
    place = 0
    while place < size:
        head = _at(stream, place, 12)
        width = 9 - head[0].bit_length()
        if width > 4:
            return
        if len(head) < width + 1:
            yield place + width + 1
            return
        sizes = 9 - head[width].bit_length()
        if sizes > 8:
            return
        if len(head) < width + sizes:
            yield place + width + sizes
            return
        kind = int.from_bytes(head[:width])
        length = int.from_bytes(head[width : width + sizes]) - (1 << 7 * sizes)
        unknown = length == (1 << 7 * sizes) - 1
        place += width + sizes
        if unknown and kind not in (_SEGMENT, _CLUSTER):
            return
        if not unknown:
            place += length
            yield place


def _riff(stream: BinaryIO, size: int) -> Iterator[int]:
    """AVI: its chunks of the outermost level."""
    place = 0
    while place < size:
        head = _at(stream, place, 12)
        length = int.from_bytes(head[4:8], "little")
        if head[:4] != b"RIFF" or length in (0, 2**32 - 1):
            return
        place += 8 + length
        yield place
        place += length % 2


def _asf(stream: BinaryIO, size: int) -> Iterator[int]:
    """WMV: its objects of the outermost level."""
    place = 0
    while place < size:
        head = _at(stream, place, 24)
        length = int.from_bytes(head[16:24], "little")
        if head[:16] not in _ASF_OBJECTS or length < 24:
            return
        place += length
        yield place


def _tags(stream: BinaryIO, size: int) -> Iterator[int]:
    """FLV: a tag for each packet."""
    place = int.from_bytes(_at(stream, 5, 4)) + 4
    while place < size:
        head = _at(stream, place, 11)
        if head[0] & 0x1F not in (8, 9, 18):
            return
        place += 15 + int.from_bytes(head[1:4]) if len(head) >= 4 else 15
        yield place


def _pieces(stream: BinaryIO, size: int) -> Iterator[int]:
    """MPEG transport streams: pieces of 188 bytes, or of 192 with a time before each."""
    head = _at(stream, 0, 400)
    length = 188 if head[0] == head[188] == head[376] == 0x47 else 192
    yield -(-size // length) * length


def _packs(stream: BinaryIO, size: int) -> Iterator[int]:
    """MPEG program streams: packs and packets."""
    place = 0
    while place < size:
        head = _at(stream, place, 14)
        if head[:3] != b"\0\0\1":
            return
        if head[3:4] == b"\xb9":
            return
        if len(head) < 6:
            yield place + 6
            return
        if head[3] == 0xBA:
            place += 12 if head[4] >> 6 == 0 else 14 + (head[13] & 7 if len(head) > 13 else 0)
        else:
            place += 6 + int.from_bytes(head[4:6])
        yield place


def _is_transport(head: bytes) -> bool:
    starts = (0, 188, 376), (4, 196, 388)
    return any(all(head[place : place + 1] == b"\x47" for place in places) for places in starts)


_KINDS: tuple[tuple[Callable[[bytes], bool], Callable[[BinaryIO, int], Iterator[int]]], ...] = (
    (lambda head: head[4:8] in _BOXES, _boxes),
    (lambda head: int.from_bytes(head[:4]) == _EBML, _elements),
    (lambda head: head[:4] == b"RIFF" and head[8:12] == b"AVI ", _riff),
    (lambda head: head[:16] == _ASF, _asf),
    (lambda head: head[:3] == b"FLV", _tags),
    (lambda head: head[:4] == b"\0\0\1\xba", _packs),
    (_is_transport, _pieces),
)
