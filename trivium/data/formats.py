"""Read one file entry by entry: each entry with an id naming file and line, each malformed one as itself."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as arrow
import pyarrow.parquet as parquet

from trivium.data.opening import kind_of, opened
from trivium.kit.errors import TriviumError

BOM = b"\xef\xbb\xbf"
_LONGEST_FIELD = 2**31 - 1


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
    content = file.read().removeprefix(BOM)
    try:
        text = content.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        yield BadLine(f"{name}:{line}", f"is not UTF-8 (byte {error.start})")
        return
    if separator is None:
        yield name, {"text": text}
        return
    line = 1
    for part in text.split(separator):
        if part.strip():
            yield f"{name}:{line}", {"text": part}
        line += part.count("\n") + separator.count("\n")


def _lines(name: str, file: BinaryIO, separator: str | None) -> Iterator[Entry | BadLine]:
    for number, line in enumerate(file, start=1):
        content = (line.removeprefix(BOM) if number == 1 else line).strip()
        if not content:
            continue
        where = f"{name}:{number}"
        try:
            value = json.loads(content.decode())
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
    try:
        value = json.loads(file.read().removeprefix(BOM).decode())
    except (ValueError, RecursionError) as error:
        yield BadLine(name, f"is not JSON ({error}); if it has one object per line, name it .jsonl")
        return
    for number, item in enumerate(value if isinstance(value, list) else [value], start=1):
        where = f"{name}:{number}"
        if isinstance(item, dict):
            yield where, item
        else:
            yield BadLine(where, f"is a {type(item).__name__}, not an object")


def _table(delimiter: str) -> Callable[[str, BinaryIO, str | None], Iterator[Entry | BadLine]]:
    def read(name: str, file: BinaryIO, separator: str | None) -> Iterator[Entry | BadLine]:
        # Wrong bytes become lone surrogates, so that one bad row does not end the reading of the others.
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        csv.field_size_limit(_LONGEST_FIELD)
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            where = f"{name}:{rows.line_num + 1}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield BadLine(where, f"is not a table's row ({error})")
                continue
            if not row:
                continue
            if any("\udc80" <= letter <= "\udcff" for cell in row for letter in cell):
                yield BadLine(where, "is not UTF-8")
            elif header is None:
                header = row
            elif len(row) != len(header):
                yield BadLine(where, f"has {len(row)} columns where the header has {len(header)}")
            else:
                yield where, dict(zip(header, row, strict=True))

    return read


def _parquet(name: str, file: BinaryIO, separator: str | None) -> Iterator[Entry | BadLine]:
    content = file if file.seekable() and isinstance(file, io.BufferedReader) else io.BytesIO(file.read())
    try:
        number = 0
        for batch in parquet.ParquetFile(content).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{name}:{number}", row
    except arrow.ArrowException as error:
        raise TriviumError(f"{name} is not a whole parquet file ({error}); fetch it again.") from error


def _arrow(name: str, file: BinaryIO, separator: str | None) -> Iterator[Entry | BadLine]:
    try:
        number = 0
        for batch in arrow.ipc.open_stream(file):
            for row in batch.to_pylist():
                number += 1
                yield f"{name}:{number}", row
    except arrow.ArrowException as error:
        raise TriviumError(f"{name} is not a whole Arrow file ({error}); save the data set again.") from error


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
