"""Read one file entry by entry: each entry with an id naming file and line, each malformed one as itself."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from trivium.data.opening import MOST_EXPANDED, MOST_PER_BYTE, kind_of, opened
from trivium.data.parquet_pages import pages
from trivium.kit.errors import TriviumError
from trivium.kit.files import without_duplicates

if TYPE_CHECKING:
    # Imported where a table is read: most commands read none, and this takes long.
    import pyarrow.parquet

BOM = b"\xef\xbb\xbf"
ID_COLUMN = b"trivium.id"
"""The key of a parquet file's metadata that names the column with the documents' ids."""
LONGEST, LARGEST = 1 << 26, 1 << 30
"""The most bytes of one entry (a line, a table's row, a part of a text), and of a file read as a whole."""
_PIECE, _ROWS = 1 << 20, 32
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
# A byte that is not UTF-8 becomes a lone surrogate, so that one bad entry does not end the others' reading.
_KEEP_BYTES = "surrogateescape"


@dataclass(frozen=True)
class BadLine:
    """A place in a file that cannot be read, and why."""

    where: str
    why: str


Entry = tuple[str, dict[str, Any]]


def entries(name: str, path: Path, separator: str | None) -> Iterator[Entry | BadLine]:
    """The entries of a file; `name` is what ids call it."""
    reader = _READERS[kind_of(path) or ".arrow"]
    with opened(path) as file:
        yield from reader(name, file, separator)


def _text(name: str, file: BinaryIO, separator: str | None) -> Iterator[Entry | BadLine]:
    line = 1
    for part in _whole(name, file) if separator is None else _divided(file, separator):
        where = name if separator is None else f"{name}:{line}"
        if isinstance(part, BadLine):
            yield part
        elif isinstance(part, _TooLong):
            yield BadLine(where, f"is a text of more than {_size(LONGEST)}")
            line += part.newlines
        else:
            wrong = _NOT_UTF8.search(part)
            if wrong is not None:
                yield BadLine(f"{name}:{line + part.count(chr(10), 0, wrong.start())}", "is not UTF-8")
            elif separator is None or part.strip():
                yield where, {"text": part}
            line += part.count("\n")
        line += (separator or "").count("\n")


@dataclass(frozen=True)
class _TooLong:
    """A part of a text that was passed over, and the lines it had."""

    newlines: int


def _whole(name: str, file: BinaryIO) -> Iterator[str | BadLine]:
    content = _content(file)
    if content is None:
        yield BadLine(
            name, f"is one text of more than {_size(LARGEST)}; say what divides it with `separator`"
        )
        return
    yield content.removeprefix(BOM).decode("utf-8", _KEEP_BYTES).replace("\r\n", "\n")


def _content(file: BinaryIO) -> bytes | None:
    """All of a file, or None where it is too large to be read as a whole."""
    pieces, left = [], LARGEST
    # Piece by piece: room for as much as is asked for would be taken at once.
    while piece := file.read(_PIECE):
        pieces.append(piece)
        left -= len(piece)
        if left < 0:
            return None
    return b"".join(pieces)


def _divided(file: BinaryIO, separator: str) -> Iterator[str | _TooLong]:
    """The parts of a text between separators, read piece by piece."""
    decoder = codecs.getincrementaldecoder("utf-8")(_KEEP_BYTES)
    held, waiting, passed = "", "", None
    piece = file.read(len(BOM))
    if piece == BOM:
        piece = file.read(_PIECE)
    while True:
        text = waiting + decoder.decode(piece, final=not piece)
        # A carriage return at the end of a piece waits for what follows it.
        waiting = "\r" if piece and text.endswith("\r") else ""
        searched = max(0, len(held) - len(separator) + 1)
        held += text[: len(text) - len(waiting)].replace("\r\n", "\n")
        start = 0
        while (end := held.find(separator, max(start, searched))) >= 0:
            part = held[start:end]
            start = end + len(separator)
            is_whole = passed is None and len(part) <= LONGEST
            yield part if is_whole else _TooLong((passed or 0) + part.count("\n"))
            passed = None
        held = held[start:]
        if len(held) > LONGEST:
            kept = held[len(held) - len(separator) + 1 :]
            passed = (passed or 0) + held.count("\n") - kept.count("\n")
            held = kept
        if not piece:
            break
        piece = file.read(_PIECE)
    is_whole = passed is None and len(held) <= LONGEST
    yield held if is_whole else _TooLong((passed or 0) + held.count("\n"))


def _lines(name: str, file: BinaryIO, separator: str | None) -> Iterator[Entry | BadLine]:
    number = 0
    while line := file.readline(LONGEST + 1):
        number += 1
        where = f"{name}:{number}"
        if len(line) > LONGEST:
            while line and not line.endswith(b"\n"):
                line = file.readline(_PIECE)
            yield BadLine(where, f"is a line of more than {_size(LONGEST)}")
            continue
        content = (line.removeprefix(BOM) if number == 1 else line).strip()
        if not content:
            continue
        try:
            value = json.loads(content.decode(), object_pairs_hook=without_duplicates)
        except UnicodeDecodeError:
            yield BadLine(where, "is not UTF-8")
        except (ValueError, RecursionError) as error:
            yield BadLine(where, f"is not JSON ({error})")
        else:
            if isinstance(value, dict):
                yield where, value
            else:
                yield BadLine(where, f"is JSON but a {type(value).__name__}, not an object")


def _json(name: str, file: BinaryIO, separator: str | None) -> Iterator[Entry | BadLine]:
    content = _content(file)
    if content is None:
        yield BadLine(name, f"is JSON of more than {_size(LARGEST)}; write one object per line, as .jsonl")
        return
    try:
        value = json.loads(content.removeprefix(BOM).decode(), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        yield BadLine(name, f"is not JSON ({error}); if it has one object per line, name it .jsonl")
        return
    for number, item in enumerate(value if isinstance(value, list) else [value], start=1):
        where = f"{name}:{number}"
        if isinstance(item, dict):
            yield where, item
        else:
            yield BadLine(where, f"is a {type(item).__name__}, not an object")


class _RowTooLong(Exception):
    """A row of a table was given up."""


class _RowLines:
    """The lines of a table, counted, and no more of them for one row than an entry may have."""

    def __init__(self, file: BinaryIO) -> None:
        self._text = io.TextIOWrapper(file, encoding="utf-8-sig", errors=_KEEP_BYTES, newline="")
        self.number = 0
        self.left = LONGEST

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._text.readline(self.left + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self.left -= len(line)
        if self.left < 0:
            while line and not line.endswith(("\n", "\r")):
                line = self._text.readline(_PIECE)
            raise _RowTooLong
        return line


def _table(delimiter: str) -> Callable[[str, BinaryIO, str | None], Iterator[Entry | BadLine]]:
    def read(name: str, file: BinaryIO, separator: str | None) -> Iterator[Entry | BadLine]:
        csv.field_size_limit(LONGEST)
        lines = _RowLines(file)
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            where = f"{name}:{lines.number + 1}"
            lines.left = LONGEST
            try:
                row = next(rows)
            except StopIteration:
                return
            except _RowTooLong:
                yield BadLine(where, f"is a row of more than {_size(LONGEST)}")
                continue
            except csv.Error as error:
                yield BadLine(where, f"is not a table's row ({error})")
                continue
            if not row:
                continue
            if any(_NOT_UTF8.search(cell) for cell in row):
                yield BadLine(where, "is not UTF-8")
            elif header is None:
                header = row
                if len(set(header)) < len(header):
                    twice = next(column for column in header if header.count(column) > 1)
                    raise TriviumError(f"{where}: two columns are called {twice!r}; rename one of them.")
            elif len(row) != len(header):
                yield BadLine(where, f"has {len(row)} columns where the header has {len(header)}")
            else:
                yield where, dict(zip(header, row, strict=True))

    return read


def _parquet(name: str, file: BinaryIO, separator: str | None) -> Iterator[Entry | BadLine]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    content = file if file.seekable() and isinstance(file, io.BufferedReader) else io.BytesIO(file.read())
    size = content.seek(0, io.SEEK_END)
    content.seek(0)
    try:
        table = parquet.ParquetFile(content)
        _refuse_expanding(name, table.metadata, content, size)
        names = table.schema_arrow.names
        if len(set(names)) < len(names):
            twice = next(column for column in names if names.count(column) > 1)
            raise TriviumError(f"{name}: two columns are called {twice!r}; rename one of them.")
        number = 0
        # A file of documents that have ids already says which column holds them.
        identity = (table.schema_arrow.metadata or {}).get(ID_COLUMN, b"").decode()
        for batch in table.iter_batches(batch_size=_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield str(row.get(identity) or f"{name}:{number}"), row
    except (arrow.ArrowException, ValueError, MemoryError) as error:
        raise TriviumError(f"{name} is not a whole parquet file ({error}); fetch it again.") from error


def _refuse_expanding(name: str, metadata: pyarrow.parquet.FileMetaData, file: Any, size: int) -> None:
    """Name a file whose row groups or pages say that they expand as no ordinary data does."""
    # Of the columns themselves nothing is asked: on statistics that are wrong, the library ends the process.
    total = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    of_pages, is_large = 0, total > max(MOST_EXPANDED, MOST_PER_BYTE * size)
    for compressed, expanded in () if is_large else pages(file, size):
        of_pages += expanded
        is_large |= expanded > max(MOST_EXPANDED, MOST_PER_BYTE * compressed)
    file.seek(0)
    if is_large or of_pages > max(MOST_EXPANDED, MOST_PER_BYTE * size):
        raise TriviumError(
            f"{name} expands to more than {MOST_PER_BYTE} times its size, as no ordinary data does; write it "
            "again without compression if you trust it."
        )


def _arrow(name: str, file: BinaryIO, separator: str | None) -> Iterator[Entry | BadLine]:
    import pyarrow as arrow

    try:
        number = 0
        for batch in arrow.ipc.open_stream(file):
            # Offsets that are wrong would be followed to wherever they lead.
            batch.validate(full=True)
            for row in batch.to_pylist():
                number += 1
                yield f"{name}:{number}", row
    except (arrow.ArrowException, ValueError, MemoryError) as error:
        raise TriviumError(f"{name} is not a whole Arrow file ({error}); save the data set again.") from error


def _size(count: int) -> str:
    return f"{count >> 30} GiB" if count >= 1 << 30 else f"{count >> 20} MiB"


_READERS: dict[str, Callable[[str, BinaryIO, str | None], Iterator[Entry | BadLine]]] = {
    ".txt": _text,
    ".text": _text,
    ".md": _text,
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
    ".arrow": _arrow,
}
