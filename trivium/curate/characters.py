"""Texts of a batch as one array of code points, and the words in it, so that numpy does the counting.

Per-document Python objects are what makes curation slow; here a batch of texts is one `uint32` array, and
words, lines and n-grams are arrays of positions in it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

_LAST_ASSIGNED = 0x32400
_ALL = 0x110000
SPACE, LETTER, DIGIT, MARK, SYMBOL, IDEOGRAPH, QUOTE = range(7)
_QUOTES = "'’"
_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_HALF = np.uint64(32)


def _kind(code: int) -> int:
    letter = chr(code)
    if letter.isspace():
        return SPACE
    if letter in _QUOTES:
        return QUOTE
    # Scripts without spaces between words: each sign counts as a word.
    if (0x2E80 <= code <= 0x30FF and letter.isalpha()) or 0x3400 <= code <= 0x9FFF or code >= 0x20000:
        return IDEOGRAPH
    category = unicodedata.category(letter)
    return {"L": LETTER, "N": DIGIT, "M": MARK}.get(category[0], SYMBOL)


@lru_cache(1)
def kinds() -> np.ndarray:
    """The kind of every code point, [0x110000] of uint8."""
    table = np.full(_ALL, SYMBOL, dtype=np.uint8)
    table[:_LAST_ASSIGNED] = [_kind(code) for code in range(_LAST_ASSIGNED)]
    return table


@lru_cache(2)
def folded(digits: bool) -> np.ndarray:
    """What a code point counts as when texts are compared: lower case, no accents; 0 is left out.

    With `digits`, every digit counts as 0, so that pages that differ in a date or a price are alike.
    """
    table = np.arange(_ALL, dtype=np.uint32)
    kind = kinds()
    for code in range(_LAST_ASSIGNED):
        if kind[code] not in (LETTER, DIGIT) or 0xAC00 <= code < 0xD7A4:
            continue
        letter = unicodedata.normalize("NFD", chr(code))
        plain = letter[0] if all(unicodedata.combining(mark) for mark in letter[1:]) else chr(code)
        lower = plain.lower()
        table[code] = ord(lower) if len(lower) == 1 else ord(plain)
        value = unicodedata.digit(chr(code), -1)
        if value >= 0:
            table[code] = ord("0") if digits else ord("0") + value
    # One comparison at a time: `isin` would take several times the table's own memory.
    for left_out in (SPACE, SYMBOL, QUOTE, MARK):
        table[kind == left_out] = 0
    return table


def mixed(values: np.ndarray) -> np.ndarray:
    """A bijection on uint64 after which every bit depends on every other."""
    values = (values ^ (values >> np.uint64(30))) * _MIX[0]
    values = (values ^ (values >> np.uint64(27))) * _MIX[1]
    return values ^ (values >> np.uint64(31))


@lru_cache(8)
def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """The powers of the base modulo 2^64 and their inverses, [size] each."""
    both = []
    for base in (int(_BASE), pow(int(_BASE), -1, 1 << 64)):
        powers = np.full(size, base, dtype=np.uint64)
        powers[0] = 1
        both.append(np.cumprod(powers, dtype=np.uint64))
    return both[0], both[1]


@dataclass(frozen=True, eq=False)
class Words:
    """Words of a batch in order: where each starts and ends, its document, its hash; arrays of [words]."""

    starts: np.ndarray
    ends: np.ndarray
    documents: np.ndarray
    hashes: np.ndarray
    count: int
    """The number of documents."""

    @cached_property
    def first(self) -> np.ndarray:
        """The place of every document's first word and, last, the number of words; [documents + 1]."""
        return np.searchsorted(self.documents, np.arange(self.count + 1))

    @property
    def lengths(self) -> np.ndarray:
        """Characters of every word."""
        return self.ends - self.starts

    @cached_property
    def characters(self) -> np.ndarray:
        """The characters of all words before each, [words + 1]."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def per_document(self, values: np.ndarray) -> np.ndarray:
        """The sum over every document's words, [documents]."""
        return np.bincount(self.documents, weights=values, minlength=self.count)

    def grams(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of all runs of `size` words inside one document, and the place of each run's first word."""
        total = len(self.hashes) - size + 1
        if total <= 0:
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        hashes = self.hashes[:total].copy()
        for place in range(1, size):
            hashes *= _BASE
            hashes += self.hashes[place : place + total]
        inside = self.documents[:total] == self.documents[size - 1 :]
        return mixed(hashes[inside]), np.flatnonzero(inside)

    def grams_at(self, places: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The same for the runs that begin at these places and end in their document."""
        places = places[places + size <= len(self.hashes)]
        places = places[self.documents[places] == self.documents[places + size - 1]]
        hashes = self.hashes[places]
        for place in range(1, size):
            hashes = hashes * _BASE + self.hashes[places + place]
        return mixed(hashes), places


class Characters:
    """The texts of a batch end to end: code points [characters], where each starts [documents + 1]."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        self.lengths = lengths

    @cached_property
    def kinds(self) -> np.ndarray:
        """The kind of every character."""
        return kinds()[self.codes]

    @cached_property
    def words(self) -> Words:
        """Runs of letters and digits, with apostrophes inside them, and runs of signs, as written."""
        kind = self.kinds.copy()
        kind[(kind == DIGIT) | (kind == MARK)] = LETTER
        quotes = np.flatnonzero(kind == QUOTE)
        if len(quotes):
            inner = quotes[(quotes > 0) & (quotes < len(kind) - 1)]
            inside = inner[(kind[inner - 1] == LETTER) & (kind[inner + 1] == LETTER)]
            kind[quotes] = SYMBOL
            kind[inside] = LETTER
        return self._runs(kind, self.codes)

    def folded_words(self, digits: bool) -> Words:
        """Runs of letters and digits in lower case without accents; signs only divide."""
        codes = folded(digits)[self.codes]
        kind = self.kinds.copy()
        kind[(kind == SYMBOL) | (kind == QUOTE)] = SPACE
        kind[(kind == DIGIT) | (kind == MARK)] = LETTER
        return self._runs(kind, codes)

    def _runs(self, kind: np.ndarray, codes: np.ndarray) -> Words:
        count = len(self.lengths)
        size = len(kind)
        if size == 0:
            none = np.empty(0, np.int64)
            return Words(none, none, none, np.empty(0, np.uint64), count)
        changes = np.empty(size, dtype=bool)
        changes[0] = True
        np.not_equal(kind[1:], kind[:-1], out=changes[1:])
        changes |= kind == IDEOGRAPH
        begun = self.starts[:-1][self.lengths > 0]
        changes[begun] = True
        edges = np.flatnonzero(changes)
        ends = np.append(edges[1:], size)
        words = kind[edges] != SPACE
        starts, ends = edges[words], ends[words]
        # A word's hash is the sum of its codes times powers of the base: a difference of two prefix sums.
        powers, inverses = _powers(1 << max(16, size.bit_length()))
        sums = np.empty(size + 1, dtype=np.uint64)
        sums[0] = 0
        np.cumsum(codes * powers[:size], out=sums[1:])
        hashes = mixed((sums[ends] - sums[starts]) * inverses[starts])
        documents = np.repeat(np.arange(count), np.diff(np.searchsorted(starts, self.starts)))
        return Words(starts, ends, documents, hashes, count)
