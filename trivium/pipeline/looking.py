"""What lies in a source before anything is made of it: its rows, columns, sizes and lengths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow.parquet as parquet

from trivium.data.conversations import Encoder
from trivium.data.encoding import Encoded
from trivium.data.preferences import PreferenceData, PreferencePair
from trivium.data.sources import Document, Reading, Source, files_of, read_documents
from trivium.data.split import in_validation, prompt_hash, text_hash
from trivium.kit.errors import TriviumError
from trivium.tokens.adopt import with_chat_template
from trivium.tokens.forms import Forms
from trivium.tokens.items import LIBRARY
from trivium.tokens.parts import PICTURES, ids_of_part, is_part
from trivium.tokens.tokenizer import Tokenizer

KINDS = ("picture", "sound")
FIRST_ROWS = 2000
MEASURED = 500
"""How many rows are read to estimate the length."""
COUNTED = 64
"""How many rows of a sample are tokenised; the others are estimated from their characters."""
LONGEST = 1 << 20
OF_A_TURN = 6
"""Tokens that a chat template spends on a message, about."""
FIRST_CHARACTERS = 4_000_000
"""How much of a source is read at most; what is behind that is estimated from the sizes of the files."""
FIRST_GENERATED = 200
"""How many documents of the invented world are written to look at them, at most."""
GENERATED_CHARACTERS, LEAST_ROWS = 100_000, 32
"""How much of them is enough, if it is so many: long ones vary less than they cost to write."""


@dataclass(frozen=True)
class Items:
    """The tokens of pictures and of sounds, and how many pictures and sounds they are of."""

    tokens: tuple[float, ...] = (0.0,) * len(KINDS)
    count: tuple[float, ...] = (0.0,) * len(KINDS)

    def of(self, kind: str) -> tuple[float, float]:
        return self.tokens[KINDS.index(kind)], self.count[KINDS.index(kind)]

    def __add__(self, other: Items) -> Items:
        return Items(
            tuple(map(sum, zip(self.tokens, other.tokens))), tuple(map(sum, zip(self.count, other.count)))
        )

    def __mul__(self, factor: float) -> Items:
        return Items(tuple(factor * one for one in self.tokens), tuple(factor * one for one in self.count))


NO_ITEMS = Items()


def _items_in(value: Any, forms: Forms) -> Items:
    """Of a row's fields; what cannot be read counts as nothing here, and is refused where it is read."""
    if is_part(value):
        try:
            tokens = len(ids_of_part(value, forms))
        except TriviumError:
            return NO_ITEMS
        kind = int(value["type"] not in PICTURES)
        mine = [float(number == kind) for number in range(len(KINDS))]
        return Items(tuple(tokens * one for one in mine), tuple(mine))
    inner: Iterable[Any] = ()
    if isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, (list, tuple)):
        inner = value
    return sum((_items_in(one, forms) for one in inner), NO_ITEMS)


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
    _encoded: dict[str, list[Encoded]] = field(default_factory=dict, repr=False, compare=False)
    _pairs: dict[str, list[PreferencePair]] = field(default_factory=dict, repr=False, compare=False)
    _items: dict[Forms, list[Items]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def counted(self) -> list[Document]:
        """The rows whose tokens are counted."""
        return self.rows[: MEASURED if self.whole else COUNTED]

    def conversations(self, tokenizer: Tokenizer) -> list[Encoded]:
        """The first rows in tokens, with what is learnt of them; each tokenizer reads them once."""
        key = f"{tokenizer.fingerprint} {tokenizer.forms}"
        if key not in self._encoded:
            with LIBRARY.passing():
                found = Encoder(with_chat_template(tokenizer), LONGEST).encode(self.counted)
                self._encoded[key] = [one for one in found if isinstance(one, Encoded)]
        return self._encoded[key]

    def items(self, forms: Forms) -> list[Items]:
        """The pictures and sounds of the rows whose tokens are counted."""
        if forms not in self._items:
            with LIBRARY.passing():
                self._items[forms] = [_items_in(row.fields, forms) for row in self.counted]
        return self._items[forms]

    def pairs(self, tokenizer: Tokenizer) -> list[PreferencePair]:
        """The first rows as preference pairs in tokens; each tokenizer reads them once."""
        key = tokenizer.fingerprint
        if key not in self._pairs:
            reader = PreferenceData(with_chat_template(tokenizer), LONGEST)
            self._pairs[key] = list(reader.read(self.counted, skip=True))
        return self._pairs[key]

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
    most, enough = (FIRST_GENERATED, GENERATED_CHARACTERS) if generated else (FIRST_ROWS, FIRST_CHARACTERS)
    limited = most if source.limit is None else min(most, source.limit)
    reading = Reading()
    wanted = source if not generated else source.model_copy(update={"limit": limited})
    rows: list[Document] = []
    characters = 0
    found = read_documents(wanted, reading)
    for row in islice(found, limited):
        rows.append(row)
        characters += _size(row)
        if characters >= FIRST_CHARACTERS or (characters >= enough and len(rows) >= LEAST_ROWS):
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


def item_share(looked: Looked, forms: Forms | None, sizes: np.ndarray) -> Items:
    """The pictures and sounds in one token of rows of these sizes, in the mean."""
    if forms is None or not looked.rows or looked.rows[0].text is not None:
        return NO_ITEMS
    found = looked.items(forms)
    return sum(found, NO_ITEMS) * (1 / max(1.0, float(sizes.mean()) * len(found)))


def lengths(
    looked: Looked, tokenizer: Tokenizer | None, vocabulary: int, forms: Forms | None = None
) -> np.ndarray:
    """The tokens of the first rows: counted with the tokenizer where there is one, else estimated."""
    rows = looked.rows[:MEASURED]
    if tokenizer is None:
        each = bytes_per_token(vocabulary)
        sizes = [round(_size(row) / each) + OF_A_TURN * _turns(row) for row in rows]
        seen = looked.items(forms) if forms is not None and rows[0].text is None else []
        more = round(sum(sum(one.tokens) for one in seen) / max(1, len(seen)))
        return np.array([max(2, size + more) for size in sizes])
    if rows[0].text is None:
        whole = looked.conversations(tokenizer)
        if whole:
            return _extended(
                np.array([len(one.tokens) for one in whole]), [one.document for one in whole], rows
            )
    some = looked.counted
    counted = np.array([len(tokenizer.encode(content_of(row))) + 1 for row in some])
    return _extended(counted, some, rows)


def _extended(counted: np.ndarray, some: Sequence[Document], rows: Sequence[Document]) -> np.ndarray:
    """The tokens of all rows, by least squares on characters and messages over those that were counted."""
    if len(rows) <= max(len(some), 2):
        return counted
    measures = lambda listed: np.array([[_size(row), _turns(row), 1.0] for row in listed])
    factors = np.linalg.lstsq(measures(some), counted.astype(float), rcond=None)[0]
    # The mean over all rows is what matters; what characters cannot tell of a row stays in the counted ones.
    others = np.rint(measures(rows[len(some) :]) @ factors).astype(int)
    return np.concatenate([counted, np.maximum(others, 2)])


def learned_share(looked: Looked, tokenizer: Tokenizer | None) -> float | None:
    """The share of the tokens of conversations and completions that is learned; None for plain text."""
    rows = looked.rows[:MEASURED]
    if rows[0].text is not None:
        return None
    if tokenizer is not None:
        encoded = looked.conversations(tokenizer)
        tokens = sum(len(one.tokens) for one in encoded)
        learned = sum(len(one.tokens) if one.learned is None else int(one.learned.sum()) for one in encoded)
        return learned / tokens if tokens else None
    whole = sum(_size(row) for row in rows)
    said = sum(len(text) for row in rows for text in _answers(row))
    return said / whole if whole else None


def answer_length(looked: Looked, tokenizer: Tokenizer | None, vocabulary: int) -> float | None:
    """The mean tokens of an answer with its end, in conversations and completions; None for plain text."""
    rows = looked.rows[:MEASURED]
    if rows[0].text is not None:
        return None
    if tokenizer is not None:
        answers = [_runs(one.learned) for one in looked.conversations(tokenizer) if one.learned is not None]
        count = sum(many for many, _ in answers)
        return sum(tokens for _, tokens in answers) / count if count else None
    said = [len(text) / bytes_per_token(vocabulary) + 1 for row in rows for text in _answers(row)]
    return float(np.mean(said)) if said else None


def _runs(learned: np.ndarray) -> tuple[int, int]:
    """How many answers a row has, runs of tokens that are learnt, and how many tokens they have together."""
    marks = np.asarray(learned, dtype=bool)
    return int(marks[0]) + int((marks[1:] & ~marks[:-1]).sum()), int(marks.sum())


def _answers(row: Document) -> list[str]:
    """What the assistant says in a row."""
    messages = row.fields.get("messages") or row.fields.get("conversations")
    if isinstance(messages, list):
        return [text for one in messages if isinstance(one, Mapping)
                and (one.get("role") or one.get("from")) in ("assistant", "gpt")
                for text in texts_of(one.get("content") or one.get("value") or "")]  # fmt: skip
    return texts_of([row.fields.get(name) for name in ("completion", "response", "output", "answer")])


@dataclass(frozen=True)
class PairSizes:
    """How many preference pairs there are, and the mean tokens of a prompt and of its answers together."""

    count: float
    prompt: float
    answers: float


def pair_sizes(
    looked: Looked, tokenizer: Tokenizer | None, vocabulary: int, share: float
) -> tuple[PairSizes, PairSizes]:
    """The pairs that are learned from, and those that this share of the prompts holds out."""
    documents = float(looked.documents or 0)
    pairs = looked.pairs(tokenizer) if tokenizer is not None else []
    if not pairs:
        sizes = pair_lengths(looked, vocabulary)
        held = float(looked.held_out(share) or 0)
        return PairSizes(documents - held, *sizes), PairSizes(held, *sizes)
    out = [in_validation(prompt_hash(one.prompt), share) for one in pairs]
    whole = looked.whole and len(looked.counted) == len(looked.rows)
    held = float(sum(out)) if whole else documents * share
    every = len(pairs) if whole else documents

    def sizes_of(count: float, wanted: bool) -> PairSizes:
        mine = [one for one, held in zip(pairs, out) if held is wanted or not whole] or pairs
        answers = [sum(len(each.tokens) for each in one.completions) for one in mine]
        return PairSizes(count, float(np.mean([len(one.prompt) for one in mine])), float(np.mean(answers)))

    return sizes_of(every - held, False), sizes_of(held, True)


def pair_lengths(looked: Looked, vocabulary: int) -> tuple[float, float]:
    """The mean tokens of a prompt and of all its answers together, by their letters."""
    rows = looked.rows[:MEASURED]
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
    """All texts inside a value, in order; where a picture or a sound lies is none."""
    if isinstance(value, str):
        return [value]
    if is_part(value):
        return []
    if isinstance(value, Mapping):
        return [text for inner in value.values() for text in texts_of(inner)]
    if isinstance(value, (list, tuple)):
        return [text for inner in value for text in texts_of(inner)]
    return []
