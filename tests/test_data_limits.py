"""Data that is larger than it looks, or says a thing twice: refused or counted, in bounded memory."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
from contextlib import suppress
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.data import formats, opening, sources
from trivium.data.parquet_pages import pages
from trivium.data.sources import Reading, Source, read_documents
from trivium.kit.errors import TriviumError

ROOM = 400 << 20
"""How much memory reading may take beyond what the process has."""


def within(room: int, work: object) -> str:
    """What `work` raises in a process of its own that can take so many more bytes of memory."""
    heard, tell = os.pipe()
    child = os.fork()
    if child == 0:
        said = "nothing was raised"
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room,) * 2)
            assert callable(work)
            said = f"returned {work()}"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(tell, said.encode()[:2000])
            os._exit(0)
    os.waitpid(child, 0)
    os.close(tell)
    with open(heard, "rb") as file:
        return file.read().decode()


def bomb(path: Path) -> None:
    """4 GB of one letter, as 4 MB of gzip or 128 KB of zstd."""
    compress = gzip.compress if path.suffix == ".gz" else zstandard.compress
    path.write_bytes(compress(b"a" * (1 << 26)) * 64)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv"])
def test_a_small_file_that_expands_to_gigabytes_is_refused(kind: str, tmp_path: Path) -> None:
    """128 KB of zstd were 4 GB of memory."""
    path = tmp_path / f"a.{kind}.zst"
    bomb(path)
    assert path.stat().st_size < 1 << 18
    said = within(ROOM, lambda: list(read_documents(Source(path=str(path), on_bad="skip"))))
    assert said.startswith(f"TriviumError: {path} expands to more than 100 times its size")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_small_gzip_file_that_expands_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}.gz"
    bomb(path)
    # Of 4 MB, a hundred times as much may be read before it is too much.
    said = within(3 * ROOM, lambda: list(read_documents(Source(path=str(path), on_bad="skip"))))
    assert said.startswith(f"TriviumError: {path} expands to more than 100 times its size")


def test_what_compresses_well_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file may expand by any factor up to a certain size, and by a hundred beyond it."""
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "the same"}\n' * 100_000))
    assert sum(1 for _ in read_documents(str(tmp_path / "a.jsonl.zst"))) == 100_000
    monkeypatch.setattr(opening, "MOST_EXPANDED", 1 << 16)
    with pytest.raises(TriviumError, match=r"a\.jsonl\.zst expands to more than 100 times its size"):
        list(read_documents(str(tmp_path / "a.jsonl.zst")))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
def test_an_entry_that_is_too_long_is_counted_and_those_around_it_are_read(kind: str, tmp_path: Path) -> None:
    long = "b" * (formats.LONGEST + 10)
    path = tmp_path / f"a.{kind}"
    parts = {
        "jsonl": [json.dumps({"text": text}) for text in ("a", long, "c")],
        "csv": ["text", "a", f'"{long}"', "c"],
        "txt": ["a", long, "c"],
    }
    sign = "\n\n" if kind == "txt" else "\n"
    path.write_text(sign.join(parts[kind]))
    separator = sign if kind == "txt" else None

    def read() -> str:
        reading = Reading()
        source = Source(path=str(path), on_bad="skip", separator=separator)
        texts = [document.text for document in read_documents(source, reading)]
        return f"{texts} {reading.named}"

    line = {"jsonl": 2, "csv": 3, "txt": 3}[kind]
    said = within(ROOM, read)
    assert said.startswith(f"returned ['a', 'c'] ['a.{kind}:{line}: is a "), said
    assert "more than 64 MiB" in said
    with pytest.raises(TriviumError, match=rf"^a\.{kind}:{line}: is a .* more than 64 MiB"):
        list(read_documents(Source(path=str(path), separator=separator)))


def test_a_row_of_a_table_that_never_ends_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No cell of it is long, and every line is short: only together they fill the memory."""
    monkeypatch.setattr(formats, "LONGEST", 1000)
    (tmp_path / "a.csv").write_text("text,n\na,1\n" + '"x\n",' * 400 + "\nb,2\n")
    reading = Reading()
    found = list(read_documents(Source(path=str(tmp_path / "a.csv"), on_bad="skip"), reading))
    assert [document.text for document in found] == ["a"]
    assert "a.csv:3: is a row of more than" in reading.named[0]


def test_a_text_without_a_separator_has_a_largest_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "LARGEST", 1 << 20)
    for name in ("a.txt", "a.json"):
        (tmp_path / name).write_text(" " * ((1 << 20) + 1))
        with pytest.raises(TriviumError, match=rf"^{name}: is .* of more than 1 MiB"):
            list(read_documents(str(tmp_path / name)))
    assert list(read_documents(Source(path=str(tmp_path / "a.txt"), separator="\n"))) == []


def test_a_parquet_file_that_expands_is_refused(tmp_path: Path) -> None:
    table = arrow.table({"text": ["a" * (1 << 20)] * 80})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 1 << 20
    said = within(ROOM, lambda: list(read_documents(str(path))))
    assert said.startswith("TriviumError: a.parquet expands to more than 100 times its size")


def with_a_page_of(content: bytes, bytes_of_page: int) -> bytes:
    """A parquet file whose first page says that it is as large when decompressed; nothing else is changed."""

    def number(value: int) -> bytes:
        found, value = bytearray(), value << 1
        while value > 0x7F:
            found.append(value & 0x7F | 0x80)
            value >>= 7
        return bytes([*found, value])

    # The header begins behind the file's mark: the page's type, then its sizes.
    _, true = next(iter(pages(io.BytesIO(content), len(content))))
    place = content.index(b"\x15" + number(true), 4)
    said = number(bytes_of_page)
    assert len(said) == len(number(true)), "the places of all that follows would be others"
    return content[: place + 1] + said + content[place + 1 + len(said) :]


def test_a_parquet_page_that_says_it_is_huge_is_refused(tmp_path: Path) -> None:
    """The library would make room for two GiB before it looks at what is in the page."""
    table = arrow.table({"text": [os.urandom(700_000).hex() for _ in range(100)]})
    path, sink = tmp_path / "a.parquet", io.BytesIO()
    parquet.write_table(table, sink, compression="zstd", use_dictionary=False, data_page_size=1 << 28)
    content = sink.getvalue()
    ((compressed, expanded),) = pages(io.BytesIO(content), len(content))
    assert 150_000_000 > expanded > compressed > 70_000_000
    path.write_bytes(content)
    assert len(list(read_documents(str(path)))) == 100
    # A number of as many bytes, so that nothing moves.
    small = arrow.table({"text": [os.urandom(1_100_000).hex()]})
    parquet.write_table(small, path, compression="zstd", use_dictionary=False)
    path.write_bytes(with_a_page_of(path.read_bytes(), 130_000_000))
    said = within(ROOM, lambda: list(read_documents(str(path))))
    assert said.startswith("TriviumError: a.parquet expands to more than 100 times its size")


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "lz4", "brotli"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_every_page_of_an_honest_file_is_found(compression: str, version: str) -> None:
    rows = [
        {"text": f"{n} " * (n % 90), "n": n, "of": [n, None], "in": {"a": 1.5 if n % 3 else None}}
        for n in range(900)
    ]
    table = arrow.Table.from_pylist(rows)
    for written in ({"use_dictionary": False}, {"write_page_index": True, "write_page_checksum": True}):
        sink = io.BytesIO()
        parquet.write_table(
            table, sink, compression=compression, data_page_version=version, data_page_size=2000,
            row_group_size=400, **written,
        )  # fmt: skip
        content = sink.getvalue()
        known = parquet.ParquetFile(io.BytesIO(content)).metadata
        columns = [
            known.row_group(n).column(m)
            for n in range(known.num_row_groups)
            for m in range(known.num_columns)
        ]
        found = list(pages(io.BytesIO(content), len(content)))
        assert len(found) > len(columns)
        # What the footer says of the columns holds their headers, too, of some hundred bytes each.
        for place, whole in ((0, "total_compressed_size"), (1, "total_uncompressed_size")):
            headers = sum(getattr(column, whole) for column in columns) - sum(page[place] for page in found)
            assert 0 < headers < 200 * len(found)
    sink = io.BytesIO()
    parquet.write_table(table.slice(0, 0), sink)
    assert sum(page[1] for page in pages(io.BytesIO(sink.getvalue()), len(sink.getvalue()))) < 100


TWICE = {
    "a.jsonl": (b'{"text": "a"}\n{"text": "b", "text": "c"}\n', r"a\.jsonl:2: .*'text' is written twice"),
    "b.jsonl": (b'{"text": "a", "x": {"y": 1, "y": 2}}\n', r"b\.jsonl:1: .*'y' is written twice"),
    "c.json": (b'[{"text": "a", "text": "b"}]', r"c\.json: .*'text' is written twice"),
    "d.csv": (b"text,n,text\na,1,b\n", r"d\.csv:1: two columns are called 'text'"),
    "e.tsv": (b"n\tn\n1\t2\n", r"e\.tsv:1: two columns are called 'n'"),
}


@pytest.mark.parametrize("name", TWICE)
def test_what_is_said_twice_is_named(name: str, tmp_path: Path) -> None:
    content, said = TWICE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TriviumError, match=said):
        list(read_documents(str(tmp_path / name)))


def test_two_columns_of_one_name_in_a_parquet_file_are_named(tmp_path: Path) -> None:
    table = arrow.Table.from_arrays([arrow.array(["a"]), arrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(TriviumError, match=r"a\.parquet: two columns are called 'text'"):
        list(read_documents(str(tmp_path / "a.parquet")))


@given(
    text=st.text(st.sampled_from("ab\r\n|é🙂\ufeff"), max_size=60),
    separator=st.text(st.sampled_from("a\n|"), min_size=1, max_size=3),
    piece=st.integers(1, 7),
)
@settings(deadline=None, max_examples=300)
def test_a_text_read_in_pieces_is_divided_as_a_whole_one(text: str, separator: str, piece: int) -> None:
    content = text.encode()
    whole = content.removeprefix(b"\xef\xbb\xbf").decode().replace("\r\n", "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "_PIECE", max(piece, 3))
        found = list(formats._divided(io.BytesIO(content), separator))
    assert found == whole.split(separator)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dataset_dict.json", "[]"), ("dataset_dict.json", '{"splits": "train"}'),
        ("dataset_dict.json", '{"splits": ["../train"]}'), ("dataset_dict.json", '{"splits": [1]}'),
        ("state.json", "{}"), ("state.json", '{"_data_files": [{}]}'), ("state.json", "{"),
        ("state.json", '{"_data_files": [{"filename": "/etc/passwd"}]}'),
        ("state.json", '{"_data_files": [{"filename": "../a.arrow"}]}'),
    ],
)  # fmt: skip
def test_a_data_set_that_names_files_elsewhere_is_refused(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TriviumError, match=name):
        sources.files_of(Source(path=str(tmp_path)))


def test_a_separator_is_at_least_one_letter() -> None:
    with pytest.raises(ValueError, match="at least 1 character"):
        Source(path="a.txt", separator="")


def test_an_arrow_file_with_wrong_offsets_is_named_and_not_followed(tmp_path: Path) -> None:
    """One changed byte among the offsets ended the process."""
    rows = [{"text": "one", "n": 1}, {"text": "two and three", "n": 2}] * 30
    table, sink = arrow.Table.from_pylist(rows), io.BytesIO()
    with arrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    content = sink.getvalue()
    offsets = content.index(
        (0).to_bytes(4, "little") + (3).to_bytes(4, "little") + (16).to_bytes(4, "little")
    )
    (tmp_path / "a.arrow").write_bytes(content[: offsets + 7] + b"\x04" + content[offsets + 8 :])

    def read() -> int:
        return len(list(read_documents(str(tmp_path))))

    assert within(ROOM, read).startswith("TriviumError: ")
    (tmp_path / "a.arrow").write_bytes(content)
    assert read() == 60


def test_a_parquet_file_with_wrong_statistics_ends_no_process(tmp_path: Path) -> None:
    """Of a column that says too much of itself, the library asks to end the process when it is looked at."""
    table = arrow.table({"text": ["a", "b"] * 50, "n": [1, None] * 50})
    parquet.write_table(table, tmp_path / "a.parquet")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")

    def read() -> str:
        for place in range(footer, len(content) - 8, 3):
            changed = bytearray(content)
            changed[place] = 0
            (tmp_path / "a.parquet").write_bytes(changed)
            with suppress(TriviumError):
                list(read_documents(Source(path=str(tmp_path / "a.parquet"), on_bad="skip")))
        return "to the end"

    assert within(ROOM, read) == "returned to the end"
