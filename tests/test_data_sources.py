"""Sources: every kind of file, plain and compressed, with stable ids and malformed lines named."""

import gzip
import json
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import zstandard

from trivium.data.sources import Reading, Source, read_documents
from trivium.kit.errors import TriviumError

ROWS = [{"text": "one\ntwo", "n": 1}, {"text": 'say "hi", é漢🙂', "n": 2}, {"text": "end", "n": 3}]


def content(kind: str) -> bytes:
    if kind in (".txt", ".md"):
        return "one\r\ntwo é漢🙂".encode()
    if kind == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    if kind == ".json":
        return json.dumps(ROWS).encode()
    if kind in (".csv", ".tsv"):
        sign = "," if kind == ".csv" else "\t"
        cells = [['"' + row["text"].replace('"', '""') + '"', str(row["n"])] for row in ROWS]
        return "".join(sign.join(line) + "\r\n" for line in [["text", "n"], *cells]).encode()
    sink = arrow.BufferOutputStream()
    parquet.write_table(arrow.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


def compress(data: bytes, ending: str) -> bytes:
    if ending == ".gz":
        return gzip.compress(data)
    if ending == ".zst":
        half = len(data) // 2
        return b"".join(zstandard.compress(part) for part in (data[:half], data[half:]))
    return data


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".md", ".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file(kind: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{kind}{ending}"
    path.write_bytes(compress(content(kind), ending))
    documents = list(read_documents(str(path)))
    if kind in (".txt", ".md"):
        assert [(document.text, document.id) for document in documents] == [("one\ntwo é漢🙂", path.name)]
        return
    assert [document.text for document in documents] == [row["text"] for row in ROWS]
    assert [int(document.fields["n"]) for document in documents] == [1, 2, 3]
    lines = {".csv": [2, 4, 5], ".tsv": [2, 4, 5]}.get(kind, [1, 2, 3])
    assert [document.id for document in documents] == [f"{path.name}:{line}" for line in lines]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_cut_off_file_is_named(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(compress(content(".jsonl") * 50, ending)[:-7])
    with pytest.raises(TriviumError, match=rf"a\.jsonl{ending} is damaged"):
        list(read_documents(Source(path=str(path), on_bad="skip")))


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv", ".jsonl.zst", ".txt.gz"])
def test_an_empty_file_has_no_documents(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{kind}"
    path.write_bytes(b"")
    reading = Reading()
    assert list(read_documents(str(path), reading)) == []
    assert reading.bad == 0


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv", ".json"])
def test_a_byte_order_mark_is_no_text(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{kind}"
    path.write_bytes(b"\xef\xbb\xbf" + content(kind))
    assert next(read_documents(str(path))).text.startswith("one\ntwo")


BAD = {
    "a.jsonl:2": (b'{"text": "a"}\n{"text": \n{"text": "b"}\n', "is not JSON"),
    "b.jsonl:3": (b'{"text": "a"}\r\n\r\n[1]\r\n{"text": "b"}', "a list, not an object"),
    "c.jsonl:2": (b'{"text": "a"}\n{"text": "\xff"}\n{"text": "b"}\n', "is not UTF-8"),
    "d.jsonl:2": (b'{"text": "a"}\n{"text": 5}\n{"text": "b"}\n', "`text` holds int"),
    "e.jsonl:2": (b'{"text": "a"}\n{"text": "\\ud800"}\n{"text": "b"}\n', "surrogate"),
    "f.csv:3": (b"text,n\na,1\nx,1,2\nb,2\n", "has 3 columns where the header has 2"),
    "g.csv:3": (b"text,n\na,1\nx\xff,1\nb,2\n", "is not UTF-8"),
    "h.csv:4": (b'text,n\n"a",1\nb,2\n"never closed,3\n', "not a table's row"),
    "i.jsonl:1": (b"[" * 100_000 + b'\n{"text": "a"}\n{"text": "b"}', "is not JSON"),
}


@pytest.mark.parametrize("where", BAD)
def test_a_bad_line_stops_or_is_counted_and_named(where: str, tmp_path: Path) -> None:
    data, why = BAD[where]
    path = tmp_path / where.partition(":")[0]
    path.write_bytes(data)
    with pytest.raises(TriviumError, match=f"^{where}: .*on_bad: skip") as caught:
        list(read_documents(str(path)))
    assert why in str(caught.value)
    reading = Reading()
    documents = list(read_documents(Source(path=str(path), on_bad="skip"), reading))
    assert [document.text for document in documents] == ["a", "b"]
    assert (reading.documents, reading.bad) == (2, 1)
    assert reading.named[0].startswith(f"{where}: ")


def test_a_text_file_that_is_not_utf8_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\nfine\nb\xe9d")
    with pytest.raises(TriviumError, match=r"a\.txt:3: is not UTF-8"):
        list(read_documents(str(tmp_path / "a.txt")))


def test_a_separator_divides_a_text_and_ids_name_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\nmore\n\n\n\nthree\n")
    documents = list(read_documents(Source(path=str(tmp_path / "a.txt"), separator="\n\n")))
    assert [(d.text, d.id) for d in documents] == [
        ("one", "a.txt:1"),
        ("two\nmore", "a.txt:3"),
        ("three\n", "a.txt:8"),
    ]


def test_folders_and_globs_read_in_one_order_under_stable_names(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.txt", "a.jsonl", "b/ignored.bin", "c/3.md.gz"):
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = ".jsonl" if "jsonl" in name else ".txt"
        path.write_bytes(gzip.compress(content(kind)) if name.endswith(".gz") else content(kind))
    ids = [document.id for document in read_documents(str(tmp_path / "texts"))]
    assert ids == [
        *[f"texts/a.jsonl:{line}" for line in (1, 2, 3)],
        "texts/b/1.txt",
        "texts/b/2.txt",
        "texts/c/3.md.gz",
    ]
    matched = [document.id for document in read_documents(str(tmp_path / "texts" / "**" / "*.txt"))]
    assert matched == ["b/1.txt", "b/2.txt"]


def test_columns_limit_and_unmapped_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "a", "k": 1}\n{"body": "b", "k": 2}\n{"body": "c"}\n{"prompt": "p"}\n')
    source = Source(path=str(path), columns={"text": "body"}, limit=2)
    assert [(d.text, d.fields) for d in read_documents(source)] == [
        ("a", {"text": "a", "k": 1}),
        ("b", {"text": "b", "k": 2}),
    ]
    with pytest.raises(TriviumError, match=r"a\.jsonl:4: has no column 'body', only 'prompt'"):
        list(read_documents(Source(path=str(path), columns={"text": "body"})))
    assert [d.text for d in read_documents(str(path))] == [None] * 4


def test_data_sets_as_the_datasets_library_saves_them(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": made, "test": made.select([2])}).save_to_disk(str(tmp_path / "dict"))
    assert [d.text for d in read_documents(str(tmp_path / "one"))] == [row["text"] for row in ROWS]
    assert [d.text for d in read_documents(str(tmp_path / "dict"))] == [row["text"] for row in ROWS]
    test = list(read_documents(Source(path=str(tmp_path / "dict"), split="test")))
    assert [d.text for d in test] == ["end"]
    with pytest.raises(TriviumError, match="has the splits train, test"):
        list(read_documents(Source(path=str(tmp_path / "dict"), split="valid")))


def test_splits_of_a_downloaded_data_set(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}-00000-of-00001.jsonl").write_text(json.dumps({"text": split}) + "\n")
    assert [d.text for d in read_documents(Source(path=str(tmp_path), split="test"))] == ["test"]
    with pytest.raises(TriviumError, match="no readable file of split 'dev'"):
        list(read_documents(Source(path=str(tmp_path), split="dev")))


def test_the_hub_is_read_as_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(
        path: str, subset: str | None, *, split: str, revision: str | None, streaming: bool
    ) -> list[dict]:
        asked.append((path, subset, split, revision, streaming))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    documents = list(read_documents(Source(path="someone/texts", subset="en", limit=2)))
    assert asked == [("someone/texts", "en", "train", None, True)]
    at_a_tag = list(read_documents(Source(path="someone/texts@v1.0", subset="en", limit=2)))
    assert asked[1] == ("someone/texts", "en", "train", "v1.0", True)
    assert [d.id for d in at_a_tag] == [d.id for d in documents]
    assert [d.id for d in documents] == ["someone/texts/train:1", "someone/texts/train:2"]


def test_the_world_is_a_source() -> None:
    source = Source(path="world:prose?seed=3", limit=5)
    documents = list(read_documents(source))
    assert len(documents) == 5
    assert all(document.text for document in documents)
    assert documents == list(read_documents(source))
    assert documents[0].text != next(read_documents(Source(path="world:prose?seed=4", limit=1))).text
    with pytest.raises(TriviumError, match="never ends"):
        list(read_documents("world:prose"))


@pytest.mark.parametrize(
    "path", ["./none.jsonl", "/no/such/folder/at/all", "none*.txt", "file.docx/x.docx/y"]
)
def test_what_is_not_there_is_named(path: str) -> None:
    with pytest.raises(TriviumError, match=r"none|no|docx"):
        list(read_documents(path))


def test_limits_hold_per_source_when_one_reading_counts_several(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content(".jsonl"))
    reading = Reading()
    both = [list(read_documents(Source(path=str(path), limit=2), reading)) for _ in range(2)]
    assert [len(documents) for documents in both] == [2, 2]
    assert reading.documents == 4
