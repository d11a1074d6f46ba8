"""What the headers of a parquet file say of its pages, read before the library makes room for them.

A page's header says how large the page is when it is decompressed, up to 2 GiB, and the library takes that
much memory before it looks at the rest. Footer and headers are in Thrift's compact protocol (a byte of type
and field number, then the value), of which everything is read and little is kept.
"""

import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

MOST_DEPTH = 32
_HEADER = 1 << 16
"""Bytes in which a page's header is looked for; statistics in it may be long."""
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 11, 12
Fields = dict[int, Any]


class NotParquet(ValueError):
    """The bytes are no such structure."""


class _Reader:
    """Reads structures one after another; the values of binary fields are passed over."""

    def __init__(self, content: bytes) -> None:
        self.content, self.place = content, 0

    def byte(self) -> int:
        if self.place >= len(self.content):
            raise NotParquet("it ends early")
        self.place += 1
        return self.content[self.place - 1]

    def number(self) -> int:
        """An unsigned number, seven bits a byte."""
        value = shift = 0
        while True:
            one = self.byte()
            value |= (one & 0x7F) << shift
            if one < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise NotParquet("it holds a number of more than 64 bits")

    def signed(self) -> int:
        value = self.number()
        return (value >> 1) ^ -(value & 1)

    def skip(self, count: int) -> None:
        if count > len(self.content) - self.place:
            raise NotParquet("it ends early")
        self.place += count

    def structure(self, depth: int = 0) -> Fields:
        """The fields of a structure by their numbers."""
        if depth > MOST_DEPTH:
            raise NotParquet("it nests too deeply")
        fields: Fields = {}
        field = 0
        while (head := self.byte()) != _STOP:
            field = field + (head >> 4) if head >> 4 else self.signed()
            kind = head & 0x0F
            fields[field] = kind == _TRUE if kind in (_TRUE, _FALSE) else self.value(kind, depth)
        return fields

    def value(self, kind: int, depth: int) -> Any:
        if kind in (_TRUE, _FALSE, _BYTE):
            return self.byte()
        if kind < _DOUBLE:
            return self.signed()
        if kind == _DOUBLE:
            return self.skip(8)
        if kind == _BINARY:
            return self.skip(self.number())
        if kind in (_LIST, _SET):
            head = self.byte()
            count = head >> 4 if head >> 4 < 15 else self.number()
            return self.values(count, (head & 0x0F,), depth)
        if kind == _MAP:
            count = self.number()
            kinds = self.byte() if count else 0
            return self.values(count, (kinds >> 4, kinds & 0x0F), depth)
        if kind == _STRUCT:
            return self.structure(depth + 1)
        raise NotParquet(f"it has a value of the unknown type {kind}")

    def values(self, count: int, kinds: tuple[int, ...], depth: int) -> list[Any]:
        if count * len(kinds) > len(self.content) - self.place:  # each takes a byte at least
            raise NotParquet("it ends early")
        return [self.value(kind, depth + 1) for _ in range(count) for kind in kinds]


def pages(file: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """The bytes of each page of a file of `size` bytes, and how many it says they are decompressed."""
    for first, end in _columns(file, size):
        while first < end:
            file.seek(first)
            reader = _Reader(file.read(min(_HEADER, end - first)))
            header = reader.structure()
            expanded, compressed = header.get(2), header.get(3)
            if not isinstance(expanded, int) or not isinstance(compressed, int) or compressed < 0:
                raise NotParquet("a page has no size")
            yield compressed, expanded
            first += reader.place + compressed


def _columns(file: BinaryIO, size: int) -> list[tuple[int, int]]:
    """Where the pages of each column of each row group begin and end."""
    file.seek(max(0, size - 8))
    tail = file.read(8)
    length = struct.unpack("<I", tail[:4])[0] if tail[4:] == b"PAR1" else size
    if length > size - 8:
        raise NotParquet("it has no footer")
    file.seek(size - 8 - length)
    footer = _Reader(file.read(length)).structure()
    places = []
    # FileMetaData.row_groups[].columns[].meta_data; of an encrypted column there is none
    for group in _structures(footer.get(4)):
        for column in _structures(group.get(1)):
            facts = column.get(3)
            if not isinstance(facts, dict) or facts.get(7) == 0:
                continue
            starts = [
                start for start in (facts.get(9), facts.get(11)) if isinstance(start, int) and start > 0
            ]
            count = facts.get(7)
            if not starts or not isinstance(count, int) or not 0 <= count <= size or max(starts) > size:
                raise NotParquet("a column lies outside the file")
            places.append((min(starts), min(min(starts) + count, size)))
    return places


def _structures(value: Any) -> list[Fields]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
