"""Reading for curation: sources into shards of rows, where what cannot be read is a counted reject."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as arrow

from trivium.curate.batch import BASE, RAW
from trivium.curate.steps.extract import CODE, HTML, MARKDOWN
from trivium.data.formats import BadLine, entries
from trivium.data.opening import COMPRESSED, KINDS, opened
from trivium.data.sources import Source, files_of, in_our_columns, matches_of, read_documents
from trivium.kit.errors import TriviumError, needing
from trivium.kit.files import expanded
from trivium.kit.listing import files_below, is_pattern

SHARD_BYTES, SHARD_DOCUMENTS = 1 << 24, 8192
_FIELD, _PAGE = 10_000, 1 << 26
_WARC = (".warc", ".wet")
_TEXTS = (".txt", ".text", ".md")
_LINE = re.compile(r"[:#](\d+)$")


@dataclass
class Row:
    """One document as it was read: text, or bytes of a kind that `extract` knows."""

    id: str
    text: str | None
    fields: dict[str, Any]
    raw: bytes | None = None
    media: str = "plain"


@dataclass
class Shard:
    """The rows that are worked on together, and what could not be read between them: (id, source, why)."""

    number: int
    table: arrow.Table
    rejects: list[tuple[str, str, str]] = field(default_factory=list)


def read_shards(
    sources: Sequence[tuple[str, Source]], raw: bool, shard_bytes: int = SHARD_BYTES
) -> Iterator[Shard]:
    """All sources, each with its name in the recipe, in shards whose borders depend on the content alone.

    With `raw`, pages, archives, Markdown and code are read as bytes.
    """
    schema = arrow.schema(list((BASE | RAW if raw else BASE).items()))
    columns: dict[str, list] = {name: [] for name in schema.names}
    rejects: list[tuple[str, str, str]] = []
    number = size = 0
    for label, found in _all_rows(sources, raw):
        if isinstance(found, BadLine):
            rejects.append((found.where, label, found.why))
            size += 1024
        else:
            _append(columns, label, found)
            size += len(found.text or "") + len(found.raw or b"")
        if size >= shard_bytes or len(columns["id"]) >= SHARD_DOCUMENTS or len(rejects) >= SHARD_DOCUMENTS:
            yield Shard(number, arrow.table(columns, schema=schema), rejects)
            columns, rejects = {name: [] for name in schema.names}, []
            number, size = number + 1, 0
    if columns["id"] or rejects:
        yield Shard(number, arrow.table(columns, schema=schema), rejects)


def _append(columns: dict[str, list], label: str, row: Row) -> None:
    line = _LINE.search(row.id)
    small = {
        name: value for name, value in row.fields.items()
        if name not in ("text", "html") and not (isinstance(value, str | list | dict) and len(value) > _FIELD)
    }  # fmt: skip
    columns["id"].append(row.id)
    columns["source"].append(label)
    columns["line"].append(int(line[1]) if line else None)
    columns["text"].append(row.text)
    columns["fields"].append(json.dumps(small, ensure_ascii=True, default=str))
    if "raw" in columns:
        columns["raw"].append(row.raw)
        columns["media"].append(row.media)


def _all_rows(sources: Sequence[tuple[str, Source]], raw: bool) -> Iterator[tuple[str, Row | BadLine]]:
    names: dict[str, int] = {}
    for place, (label, source) in enumerate(sources):
        found = _rows(place, label, source, raw, names)
        for row in found if source.limit is None else _first(found, source.limit):
            if isinstance(row, BadLine) and "on_bad" in source.model_fields_set and source.on_bad == "stop":
                raise TriviumError(f"{row.where}: {row.why}; fix it or set `on_bad: skip`.")
            yield label, row


def _first(rows: Iterator[Row | BadLine], limit: int) -> Iterator[Row | BadLine]:
    left = limit
    for row in rows if left else ():
        yield row
        left -= isinstance(row, Row)
        if not left:
            return


def _rows(
    place: int, label: str, source: Source, raw: bool, names: dict[str, int]
) -> Iterator[Row | BadLine]:
    if source.path.startswith("world:"):
        for document in read_documents(source):
            # The same source may be named twice, with other options.
            known = names.setdefault(source.path.partition("?")[0], place) == place
            yield Row(document.id if known else f"{label}:{document.id}", document.text, document.fields)
        return
    if "://" in source.path:
        yield from _remote_rows(place, label, source, raw, names)
        return
    listed = _files(source) if raw else files_of(source)
    if listed is None:
        for document in read_documents(source):
            yield Row(document.id, document.text, document.fields)
        return
    if source.subset is not None:
        raise TriviumError(
            f"`subset: {source.subset}` names a part of a data set on the hub, and {source.path} lies here; "
            "leave it out."
        )
    for name, path in listed:
        own = name if names.setdefault(name, place) == place else f"{label}/{name}"
        yield from _file_rows(own, path, source, raw)


def _file_rows(name: str, path: Path, source: Source, raw: bool) -> Iterator[Row | BadLine]:
    """The rows of a file; one that is damaged ends there, by name, and the others are read all the same."""
    before = path.stat()
    try:
        if not raw and source.separator is None and ending_of(path) in _TEXTS and _is_large(path):
            yield BadLine(name, f"is one text of more than {_PAGE >> 20} MiB; divide it with `separator`")
            return
        reader = _raw_entries(name, path) if raw else entries(name, path, source.separator)
        for found in reader:
            yield found if isinstance(found, BadLine | Row) else _row(source, *found)
    except TriviumError as error:
        yield BadLine(name, str(error))
        return
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise TriviumError(f"{path} changed while it was read; run again once nothing writes to it.")


def _is_large(path: Path) -> bool:
    """Whether a file that is read as one text is larger than a page may be."""
    left = _PAGE
    with opened(path) as file:
        while block := file.read(min(left + 1, 1 << 20)):
            left -= len(block)
            if left < 0:
                return True
    return False


def _row(source: Source, name: str, given: dict[str, Any]) -> Row | BadLine:
    fields = in_our_columns(source, name, given)
    if isinstance(fields, BadLine):
        return fields
    page = isinstance(fields.get("html"), str)
    text = fields.get("html") if page else fields.get("text")
    if not isinstance(text, str):
        said = f"`text` holds {type(text).__name__}" if "text" in fields else "has no column `text`"
        return BadLine(name, f"{said}; columns are {', '.join(fields)}; map one with `columns`")
    try:
        text.encode()
    except UnicodeEncodeError:
        return BadLine(name, "holds half a surrogate pair, which is no letter")
    if not text.strip():
        return BadLine(name, "is empty")
    return Row(name, text, fields, media="html" if page else "plain")


def ending_of(path: Path) -> str:
    """The ending that says what a file holds, without its compression."""
    endings = [one.lower() for one in path.suffixes]
    if endings and endings[-1] in COMPRESSED:
        endings.pop()
    return endings[-1] if endings else ""


def _is_known(path: Path) -> bool:
    return ending_of(path) in (*HTML, *MARKDOWN, *_WARC, *CODE, *KINDS, ".arrow")


def _files(source: Source) -> list[tuple[str, Path]] | None:
    """The files that `extract` can read behind a source, with their names."""
    path = expanded(source.path)
    if path.is_file():
        if not _is_known(path):
            raise TriviumError(f"{path}: `extract` does not know files that end in `{ending_of(path)}`.")
        return [(path.name, path)]
    if path.is_dir():
        found = sorted(one for one in files_below(path) if _is_known(one))
        if not found:
            raise TriviumError(f"{path} holds no file that `extract` can read; check the path.")
        return [(one.relative_to(path.parent).as_posix(), one) for one in found]
    if is_pattern(source.path):
        return matches_of(source, "file that `extract` can read", _is_known)
    return files_of(source)


def _raw_entries(name: str, path: Path) -> Iterator[Row | BadLine | tuple[str, dict[str, Any]]]:
    ending = ending_of(path)
    if ending in _WARC:
        with opened(path) as file:
            yield from _records(name, file)
    elif ending in (*HTML, *MARKDOWN, *CODE, ".txt", ".text"):
        media = "html" if ending in HTML else "markdown" if ending in MARKDOWN else f"code:{CODE.get(ending)}"
        with opened(path) as file:
            raw = file.read(_PAGE + 1)
        if len(raw) > _PAGE:
            yield BadLine(name, f"is one text of more than {_PAGE >> 20} MiB")
        elif not raw:
            yield BadLine(name, "is empty")
        else:
            yield Row(name, None, {}, raw, "plain" if ending in (".txt", ".text") else media)
    else:
        yield from entries(name, path, None)


def _records(name: str, file: BinaryIO) -> Iterator[Row | BadLine]:
    """The pages of a web archive; what a record expands to is bounded by the size of a page."""
    with needing("`extract` reads web archives with warcio: pip install 'trivium[curate]'."):
        from warcio.archiveiterator import ArchiveIterator
        from warcio.exceptions import ArchiveLoadFailed
    number = 0
    records = ArchiveIterator(file)
    while True:
        number += 1
        where = f"{name}:{number}"
        try:
            record = next(records, None)
            if record is None:
                return
            if record.rec_type not in ("response", "conversion", "resource"):
                continue
            headers = record.http_headers if record.rec_type == "response" else record.rec_headers
            said = (headers.get_header("Content-Type") or "") if headers else ""
            kind = said.partition(";")[0].strip().lower()
            if kind not in ("text/html", "application/xhtml+xml", "text/plain", "text/markdown"):
                yield BadLine(where, f"is {kind or 'of no known kind'}, not text")
                continue
            raw = record.content_stream().read(_PAGE + 1)
        except ArchiveLoadFailed as error:
            yield BadLine(where, f"is no record of a web archive ({error}); the rest of the file is left out")
            return
        if len(raw) > _PAGE:
            yield BadLine(where, f"is a page of more than {_PAGE >> 20} MiB")
            continue
        fields = {
            "url": record.rec_headers.get_header("WARC-Target-URI"),
            "date": record.rec_headers.get_header("WARC-Date"),
        }
        media = {"text/plain": "plain", "text/markdown": "markdown"}.get(kind, "html")
        yield Row(where, None, fields, raw, media) if raw else BadLine(where, "is empty")


def _remote_rows(
    place: int, label: str, source: Source, raw: bool, names: dict[str, int]
) -> Iterator[Row | BadLine]:
    """Files behind a URL that fsspec knows (s3, gcs, ssh, …), fetched one at a time."""
    with needing(f"{source.path} is read with fsspec: pip install 'trivium[curate]'."):
        import fsspec
    try:
        system, path = fsspec.core.url_to_fs(source.path)
        found = [path] if system.isfile(path) else sorted(
            system.glob(path) if is_pattern(path) else system.find(path)
        )  # fmt: skip
    except (ImportError, ValueError, OSError) as error:
        raise TriviumError(
            f"{source.path} cannot be listed: {error}; check the URL and its library."
        ) from error
    known = [one for one in found if (_is_known(Path(one)) if raw else ending_of(Path(one)) in KINDS)]
    if not known:
        raise TriviumError(f"{source.path} holds no readable file; it needs {', '.join(KINDS)}.")
    with tempfile.TemporaryDirectory(prefix="trivium-fetch-") as folder:
        for number, one in enumerate(known):
            here = Path(folder, f"{number}-{Path(one).name}")
            try:
                system.get_file(one, str(here))
            except OSError as error:
                yield BadLine(one, f"cannot be fetched: {error}")
                continue
            own = one if names.setdefault(one, place) == place else f"{label}/{one}"
            yield from _file_rows(own, here, source, raw)
            here.unlink()
