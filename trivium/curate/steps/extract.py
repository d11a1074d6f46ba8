"""Extract: the text of web pages, archives of them, Markdown, code and plain files."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from functools import lru_cache
from typing import ClassVar, Literal

import pyarrow as arrow
from pydantic import Field

from trivium.curate.batch import Batch, Outcome
from trivium.curate.step import Step
from trivium.kit.errors import needing
from trivium.kit.numbers import Count

CODE = {
    ".py": "python", ".pyi": "python", ".js": "javascript", ".mjs": "javascript", ".ts": "typescript",
    ".tsx": "typescript", ".jsx": "javascript", ".c": "c", ".h": "c", ".cc": "c++", ".cpp": "c++",
    ".hpp": "c++", ".cs": "c#", ".go": "go", ".rs": "rust", ".java": "java", ".kt": "kotlin",
    ".scala": "scala", ".rb": "ruby", ".php": "php", ".pl": "perl", ".pm": "perl", ".lua": "lua",
    ".r": "r", ".jl": "julia", ".hs": "haskell", ".ml": "ocaml", ".swift": "swift", ".sh": "shell",
    ".bash": "shell", ".sql": "sql", ".css": "css", ".scss": "css", ".yaml": "yaml", ".yml": "yaml",
    ".toml": "toml", ".tex": "tex", ".el": "lisp", ".lisp": "lisp", ".clj": "clojure", ".ex": "elixir",
    ".erl": "erlang", ".f90": "fortran", ".m": "matlab", ".zig": "zig", ".nim": "nim", ".dart": "dart",
}  # fmt: skip
"""The programming language of a file by its ending."""
HTML = (".html", ".htm", ".xhtml")
MARKDOWN = (".md", ".markdown")
_META = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([A-Za-z0-9_-]{2,40})""", re.IGNORECASE)
_FRONT = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)")
_LINK = re.compile(r"\[([^\]]*)\]\([^)\s]*(?:\s+\"[^\"]*\")?\)")
_TAG = re.compile(r"</?[A-Za-z][^<>\n]*>")


class Extract(Step):
    """The main text of each file: pages without menus, Markdown without its frame, code as it stands."""

    name: ClassVar[str] = "extract"
    short: ClassVar[str] = "html"
    needs_raw: ClassVar[bool] = True

    html: Literal["trafilatura", "resiliparse"] = "trafilatura"
    """What reads pages: trafilatura is more careful, resiliparse ten times as fast."""
    largest: Count = Field(default=16_000_000, ge=1)
    """A page of more bytes is left out."""
    markdown: Literal["plain", "keep"] = "plain"
    """Whether Markdown loses links, images and comments or is kept as it is written."""

    def columns(self) -> dict[str, arrow.DataType]:
        return {"media": arrow.string()}

    def check(self) -> None:
        _reader(self.html)

    def run(self, batch: Batch) -> Outcome:
        raws = batch.records.column("raw").to_pylist()
        medias = batch.records.column("media").to_pylist()
        texts, reasons = [], []
        for text, raw, media in zip(batch.texts, raws, medias):
            found, why = self._text(text, raw, media)
            texts.append(found)
            reasons.append(why)
        return Outcome(reasons, texts)

    def _text(self, text: str | None, raw: bytes | None, media: str) -> tuple[str, str | None]:
        if raw is not None:
            if len(raw) > self.largest:
                return "", f"too large: {len(raw):,} bytes, at most {self.largest:,}"
            if media != "html" and b"\0" in raw[:4096] and not raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                return "", "binary: zero bytes where text should be"
            text = decoded(raw, media == "html")
        text = (text or "").replace("\0", "")
        if media == "html":
            try:
                text = _reader(self.html)(text)
            # The parsers are written for whatever the web holds, but not every page was foreseen.
            except Exception as error:
                return "", f"unreadable page: {type(error).__name__}: {str(error)[:100]}"
        elif media == "markdown" and self.markdown == "plain":
            text = _plain_markdown(text)
        text = text.strip()
        return text, None if text else "empty: no text was found"


def decoded(raw: bytes, is_page: bool = False) -> str:
    """Bytes as text: by their mark, as UTF-8, by what a page says of itself, or by what they look like."""
    for mark, encoding in (
        (b"\xef\xbb\xbf", "utf-8"),
        (b"\xff\xfe", "utf-16-le"),
        (b"\xfe\xff", "utf-16-be"),
    ):
        if raw.startswith(mark):
            return raw[len(mark) :].decode(encoding, "replace")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        pass
    said = _META.search(raw[:4096]) if is_page else None
    if said is not None:
        try:
            return raw.decode(said[1].decode("ascii"), "replace")
        # A codec there is, such as `undefined` or `idna`, may decode nothing.
        except (LookupError, UnicodeError):
            pass
    return raw.decode(_likeliest(raw), "replace")


def _likeliest(raw: bytes) -> str:
    """The encoding that bytes look like; Western European where nothing can tell."""
    try:
        from resiliparse.parse.encoding import detect_encoding
    except ImportError:
        return "cp1252"
    found = detect_encoding(raw) or "cp1252"
    try:
        codecs.lookup(found)
    except LookupError:
        return "cp1252"
    return found


def _plain_markdown(text: str) -> str:
    """Markdown without front matter, comments, images, tags, and with the words of links alone."""
    parts = re.split(r"(^```.*?^```[^\n]*$)", text, flags=re.DOTALL | re.MULTILINE)
    for place in range(0, len(parts), 2):
        part = _FRONT.sub("", parts[place]) if place == 0 else parts[place]
        part = _IMAGE.sub("", _COMMENT.sub("", part))
        parts[place] = _TAG.sub("", _LINK.sub(r"\1", part))
    return "".join(parts)


@lru_cache(2)
def _reader(name: str) -> Callable[[str], str]:
    with needing(f"`extract` reads pages with {name}: pip install 'trivium[curate]'."):
        if name == "trafilatura":
            import trafilatura

            return lambda page: trafilatura.extract(page, include_comments=False, deduplicate=False) or ""
        from resiliparse.extract.html2text import extract_plain_text

        return lambda page: extract_plain_text(page, main_content=True, alt_texts=False)
