"""Text from pages, web archives, Markdown and code, also where they are damaged or lie about themselves."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import pytest
import trafilatura
from curating import curated, write_lines
from resiliparse.extract.html2text import extract_plain_text
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from trivium.curate.steps.extract import decoded

PARAGRAPH = (
    "The old mill stands by the river, and every autumn people of the village come to see the wheel turn. "
    "It was built by two brothers who had learned their craft in another country, and it has been repaired "
    "many times since then. "
)
PAGE = (
    "<html><head><title>The mill</title><style>p {color: red}</style></head><body>"
    "<nav><a href='/'>Home</a> <a href='/about'>About us</a></nav>"
    f"<article><h1>The mill</h1><p>{PARAGRAPH}</p><p>{PARAGRAPH} Größe: café.</p></article>"
    "<footer>Subscribe to our newsletter</footer><script>alert('x')</script></body></html>"
)


def record(writer: WARCWriter, url: str, body: bytes, kind: str, *headers: tuple[str, str]) -> None:
    http = StatusAndHeaders("200 OK", [("Content-Type", kind), *headers], protocol="HTTP/1.1")
    writer.write_record(
        writer.create_warc_record(url, "response", payload=io.BytesIO(body), http_headers=http)
    )


def archive(path: Path) -> None:
    with path.open("wb") as file:
        writer = WARCWriter(file, gzip=True)
        record(writer, "https://a.example/mill", PAGE.encode(), "text/html; charset=utf-8")
        record(writer, "https://a.example/logo", b"\x89PNG", "image/png")
        record(writer, "https://b.example/note", b"a plain note", "text/plain")
        bomb = gzip.compress(bytes(1 << 27), 9)
        record(writer, "https://c.example/bomb", bomb, "text/html", ("Content-Encoding", "gzip"))
        record(writer, "https://a.example/last", b"the last note", "text/plain")


def test_pages_are_read_as_trafilatura_and_resiliparse_read_them(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "mill.html").write_text(PAGE, encoding="utf-8")
    kept, _ = curated(tmp_path / "one", [str(tmp_path / "raw")], ["extract"])
    assert [row["text"] for row in kept] == [trafilatura.extract(PAGE, include_comments=False).strip()]
    assert "Home" not in kept[0]["text"]
    assert "café" in kept[0]["text"]
    assert kept[0]["media"] == "html"
    kept, _ = curated(tmp_path / "other", [str(tmp_path / "raw")], [{"extract": "resiliparse"}])
    assert [row["text"] for row in kept] == [
        extract_plain_text(PAGE, main_content=True, alt_texts=False).strip()
    ]


def test_a_web_archive_gives_its_pages_and_rejects_the_rest_by_name(tmp_path: Path) -> None:
    archive(tmp_path / "crawl.warc.gz")
    kept, dropped = curated(tmp_path / "out", [str(tmp_path / "crawl.warc.gz")], ["extract"])
    assert [(row["id"], '"https://' in row["fields"]) for row in kept] == [
        ("crawl.warc.gz:1", True), ("crawl.warc.gz:3", True), ("crawl.warc.gz:5", True),
    ]  # fmt: skip
    assert "wheel turn" in kept[0]["text"]
    said = {row["id"]: row["reason"] for row in dropped}
    assert said["crawl.warc.gz:2"] == "unreadable: is image/png, not text"
    assert "more than 64 MiB" in said["crawl.warc.gz:4"]


def test_a_web_archive_that_is_cut_off_or_none_keeps_what_came_before(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    archive(raw / "whole.warc.gz")
    content = (raw / "whole.warc.gz").read_bytes()
    (raw / "cut.warc.gz").write_bytes(content[: len(content) - 200])
    (raw / "whole.warc.gz").unlink()
    (raw / "none.warc").write_text("this is no archive\n" * 20)
    kept, dropped = curated(tmp_path / "out", [str(raw)], ["extract"])
    assert kept[0]["id"] == "raw/cut.warc.gz:1"
    assert any(row["id"].startswith("raw/cut.warc.gz") and "damaged" in row["reason"] for row in dropped)
    assert any(row["id"].startswith("raw/none.warc") for row in dropped)


def test_files_of_every_kind_and_encoding_become_text(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "a.py").write_text("def one():\n    return 1\n")
    markdown = "---\nlayout: x\n---\n# Title\nSee [the page](http://x.example) ![logo](l.png) <b>now</b>.\n"
    markdown += "```\nif a < b > c: [x](y)\n```\n"
    (raw / "b.md").write_text(markdown)
    (raw / "c.txt").write_bytes("Größe café".encode("cp1252"))
    (raw / "d.txt").write_bytes("utf sixteen ü".encode("utf-16"))
    page = f"<html><head><meta charset='iso-8859-2'></head><body><p>{PARAGRAPH * 3} Łódź</p></body></html>"
    (raw / "e.html").write_bytes(page.encode("iso-8859-2"))
    said = {
        "koi8-r": "Привет, как дела? Москва и все остальные города",
        "euc-jp": "ある所に子供のいない老夫婦が住んでいた。",
    }
    for encoding, text in said.items():
        # A page that does not say how it is written.
        body = f"<html><body><p>{text * 5}</p></body></html>".encode(encoding)
        (raw / f"{encoding}.html").write_bytes(body)
    (raw / "f.txt").write_bytes(b"\0\1\2binary" * 9)
    (raw / "g.html").write_bytes(b"")
    write_lines(raw / "h.jsonl", [{"html": PAGE}, "plain row"])
    (raw / "i.exe").write_bytes(b"not listed")
    kept, dropped = curated(tmp_path / "out", [str(raw)], ["extract"])
    texts = {row["id"]: (row["media"], row["text"]) for row in kept}
    assert texts["raw/a.py"] == ("code:python", "def one():\n    return 1")
    assert texts["raw/b.md"] == ("markdown", "# Title\nSee the page  now.\n```\nif a < b > c: [x](y)\n```")
    assert texts["raw/c.txt"][1] == "Größe café"
    assert texts["raw/d.txt"][1] == "utf sixteen ü"
    assert "Łódź" in texts["raw/e.html"][1]
    for encoding, text in said.items():
        assert text in texts[f"raw/{encoding}.html"][1]
    assert PARAGRAPH.strip() in texts["raw/h.jsonl:1"][1]
    assert texts["raw/h.jsonl:2"][1] == "plain row"
    assert {row["id"]: row["reason"].partition(":")[0] for row in dropped} == {
        "raw/f.txt": "binary", "raw/g.html": "unreadable",
    }  # fmt: skip


@pytest.mark.parametrize("named", ["undefined", "idna", "punycode", "no-such-one"])
def test_a_page_that_names_no_encoding_of_texts_is_read_by_what_it_looks_like(named: str) -> None:
    page = f'<meta charset="{named}"><p>Das Café öffnet früh, und über dem Fluß steht die Sonne.</p>'
    assert decoded(page.encode("cp1252"), True) == page


def test_a_page_that_is_too_large_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 5000)
    (tmp_path / "b.txt").write_text("short")
    paths = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    kept, dropped = curated(tmp_path / "out", paths, [{"extract": {"largest": 1000}}])
    assert [row["text"] for row in kept] == ["short"]
    assert dropped[0]["reason"] == "too large: 5,000 bytes, at most 1,000"
