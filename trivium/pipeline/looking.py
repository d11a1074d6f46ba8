"""What lies in a source before anything is made of it: its rows, columns, sizes and lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow.parquet as parquet

from trivium.data.conversations import Encoder
from trivium.data.encoding import Encoded
from trivium.data.preferences import PreferenceData
from trivium.data.shards import in_validation, text_hash
from trivium.data.sources import Document, Reading, Source, files_of, read_documents
from trivium.tokens.adopt import with_chat_template
from trivium.tokens.tokenizer import Tokenizer

FIRST_ROWS = 2000
MEASURED = 500
LONGEST = 1 << 20
OF_A_TURN = 6
"""Tokens that a chat template spends on a message, about."""
FIRST_CHARACTERS = 4_000_000
"""How much of a source is read at most; what is behind that is estimated from the sizes of the files."""
FIRST_GENERATED = 200
"""How many documents of the invented world are written to look at them."""


@dataclass(frozen=True)
class Looked:
    """The first rows of a source and what follows from them."""

    rows: list[Document]
    bad: list[str]
    whole: bool
    """Whether the rows are all there are."""
    documents: int | None
    """How many documents there are, estimated unless `whole`; None where nothing tells."""
    characters: list[int] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        """The columns of the first rows, in order."""
        return list(dict.fromkeys(name for row in self.rows[:50] for name in row.fields))

    def held_out(self, share: float) -> int | None:
        """How many documents a share holds out: counted where all rows are known, else estimated."""
        if self.whole:
            return sum(in_validation(text_hash(row), share) for row in self.rows)
        return None if self.documents is None else round(self.documents * share)


def look(source: Source) -> Looked:
    """The first rows of a source; a row that cannot be read stops it, as it would stop the stage."""
    generated = source.path.startswith("world:")
    most = FIRST_GENERATED if generated else FIRST_ROWS
    limited = most if source.limit is None else min(most, source.limit)
    reading = Reading()
    wanted = source if not generated else source.model_copy(update={"limit": limited})
    rows: list[Document] = []
    characters = 0
    found = read_documents(wanted, reading)
    for row in islice(found, limited):
        rows.append(row)
        characters += _size(row)
        if characters >= FIRST_CHARACTERS:
            break
    whole = (
        not generated and len(rows) < limited and characters < FIRST_CHARACTERS and next(found, None) is None
    )
    whole = whole or (source.limit is not None and len(rows) == source.limit)
    sizes = [_size(row) for row in rows]
    documents = len(rows) if whole else _estimated(source, sizes)
    return Looked(rows, reading.named, whole, documents, sizes)


def _size(row: Document) -> int:
    return len(content_of(row))


def _estimated(source: Source, sizes: list[int]) -> int | None:
    """How many documents there are, going by the files' sizes and the rows read so far."""
    if source.path.startswith("world:"):
        return source.limit
    listed = files_of(source)
    if listed is None or not sizes:
        return source.limit
    if all(path.name.endswith(".parquet") for _, path in listed):
        count = sum(parquet.ParquetFile(path).metadata.num_rows for _, path in listed)
    else:
        # Names and quotes of a JSON row, and what compression saves: about right is enough here.
        packed = sum(path.stat().st_size * (3 if path.suffix in (".gz", ".zst", ".bz2", ".xz") else 1)
                     for _, path in listed)  # fmt: skip
        count = max(len(sizes), round(packed / (1.1 * sum(sizes) / len(sizes))))
    return count if source.limit is None else min(count, source.limit)


CONTENT = (
    "messages", "conversations", "prompt", "completion", "response", "chosen", "rejected", "instruction",
    "input", "output", "question", "answer", "problem", "solution", "query",
)  # fmt: skip
"""Columns that stages learn from or pose."""


def bytes_per_token(vocabulary: int) -> float:
    """What a vocabulary of this size makes of English text, roughly."""
    return min(4.5, 1.0 + 0.8 * float(np.log2(max(vocabulary, 256) / 256)))


def lengths(looked: Looked, tokenizer: Tokenizer | None, vocabulary: int) -> np.ndarray:
    """The tokens of the first rows: counted with the tokenizer where there is one, else estimated."""
    rows = looked.rows[:MEASURED]
    if tokenizer is None:
        each = bytes_per_token(vocabulary)
        sizes = [round(_size(row) / each) + OF_A_TURN * _turns(row) for row in rows]
        return np.array([max(2, size) for size in sizes])
    if rows[0].text is None:
        encoder = Encoder(with_chat_template(tokenizer), LONGEST)
        whole = [len(one.tokens) for one in encoder.encode(rows) if isinstance(one, Encoded)]
        if whole:
            return np.array(whole)
    return np.array([len(tokenizer.encode(content_of(row))) + 1 for row in rows])


def learned_share(looked: Looked, tokenizer: Tokenizer | None) -> float | None:
    """The share of the tokens of conversations and completions that is learned; None for plain text."""
    rows = looked.rows[:MEASURED]
    if rows[0].text is not None:
        return None
    if tokenizer is not None:
        encoded = [one for one in Encoder(with_chat_template(tokenizer), LONGEST).encode(rows)
                   if isinstance(one, Encoded)]  # fmt: skip
        tokens = sum(len(one.tokens) for one in encoded)
        learned = sum(len(one.tokens) if one.learned is None else int(one.learned.sum()) for one in encoded)
        return learned / tokens if tokens else None
    whole = sum(_size(row) for row in rows)
    said = sum(len(text) for row in rows for text in _answers(row))
    return said / whole if whole else None


def _answers(row: Document) -> list[str]:
    """What the assistant says in a row."""
    messages = row.fields.get("messages") or row.fields.get("conversations")
    if isinstance(messages, list):
        return [text for one in messages if isinstance(one, Mapping)
                and (one.get("role") or one.get("from")) in ("assistant", "gpt")
                for text in texts_of(one.get("content") or one.get("value") or "")]  # fmt: skip
    return texts_of([row.fields.get(name) for name in ("completion", "response", "output", "answer")])


def pair_lengths(looked: Looked, tokenizer: Tokenizer | None, vocabulary: int) -> tuple[float, float]:
    """The mean tokens of a prompt and of all its answers together."""
    rows = looked.rows[:MEASURED]
    if tokenizer is not None:
        pairs = list(PreferenceData(with_chat_template(tokenizer), LONGEST).read(rows, skip=True))
        if pairs:
            prompts = [len(one.prompt) for one in pairs]
            answers = [sum(len(each.tokens) for each in one.completions) for one in pairs]
            return float(np.mean(prompts)), float(np.mean(answers))
    each = bytes_per_token(vocabulary)
    answers = [len("".join(texts_of([row.fields.get(name) for name in ANSWERS]))) for row in rows]
    prompt = float(np.mean([_size(row) - size for row, size in zip(rows, answers)])) / each
    return prompt + OF_A_TURN, float(np.mean(answers)) / each + 2 * OF_A_TURN


ANSWERS = ("chosen", "rejected", "completion", "response")


def _turns(row: Document) -> int:
    """How many messages a row has."""
    return sum(len(value) for value in row.fields.values() if isinstance(value, list))


def content_of(row: Document) -> str:
    """What a stage would read of a row: its text, its messages, its prompt and answers; else every text."""
    if row.text is not None:
        return row.text
    named = [row.fields[name] for name in CONTENT if row.fields.get(name) is not None]
    return "\n".join(texts_of(named or row.fields))


def texts_of(value: Any) -> list[str]:
    """All texts inside a value, in order."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for inner in value.values() for text in texts_of(inner)]
    if isinstance(value, (list, tuple)):
        return [text for inner in value for text in texts_of(inner)]
    return []
