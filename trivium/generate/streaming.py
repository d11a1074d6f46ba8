"""Text as it arrives: whole letters only, and never a piece of a stop text."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from tokenizers import decoders

from trivium.generate.chat_fit import END_THINK, THINK

if TYPE_CHECKING:
    from trivium.tokens.tokenizer import Tokenizer

BROKEN = "\ufffd"
LONGEST_LETTER = 8


@lru_cache(maxsize=8)
def spelling(tokenizer: Tokenizer) -> dict[int, str] | None:
    """Where to note what single tokens spell; None where that depends on what stands before them."""
    return {} if isinstance(tokenizer.backend.decoder, decoders.ByteLevel) else None


class TextStream:
    """Decodes tokens one by one; `text` is what is settled, and ends before a stop text."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._spelling = spelling(tokenizer)
        self._before: list[int] = []
        self._open: list[int] = []
        self._held = ""
        self.text = ""
        self.stopped = False
        # where in the text each token began that may yet belong to a stop text
        self._begun: deque[int] = deque()

    def push(self, token: int) -> str:
        """Take a token in and return the text that is settled by it."""
        if self._stops:
            self._begun.append(len(self.text) + len(self._held))
        if self._spelling is not None and not self._open:
            piece = self._spelt(token)
            if not piece.endswith(BROKEN):
                self._before = [token]
                return self._settle(piece, last=False)
        self._open.append(token)
        piece = self._decoded()
        if piece.endswith(BROKEN):
            if len(self._open) < LONGEST_LETTER:
                return ""
            self._spelling = None  # what comes next may complete a letter given up on
        self._before, self._open = self._open, []
        return self._settle(piece, last=False)

    @property
    def unsettled(self) -> int:
        """How many of the last tokens begin where the settled text ends or later."""
        while self._begun and self._begun[0] < len(self.text):
            self._begun.popleft()
        return len(self._begun)

    def finish(self) -> str:
        """Return what was still held back."""
        piece = self._decoded() if self._open else ""
        self._open = []
        return self._settle(piece, last=True)

    def _spelt(self, token: int) -> str:
        """The letters of one token, decoded once for all texts."""
        assert self._spelling is not None
        found = self._spelling.get(token)
        if found is None:
            found = self._spelling[token] = self._tokenizer.decode([token])
        return found

    def _decoded(self) -> str:
        # decoders that treat the first token of a text differently need one to stand before
        decode = self._tokenizer.decode
        return decode(self._before + self._open)[len(decode(self._before)) :]

    def _settle(self, piece: str, *, last: bool) -> str:
        if not self._stops:
            self.text += piece
            return piece
        if self.stopped:
            return ""
        self._held += piece
        found = [place for place in (self._held.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.stopped = True
            ready = self._held[: min(found)]
        else:
            kept = 0 if last else beginning_at_end(self._held, self._stops)
            ready = self._held[: len(self._held) - kept]
        self._held = self._held[len(ready) :]
        self.text += ready
        return ready


class ReasoningStream:
    """Separates thinking from answer while the text is still arriving."""

    def __init__(self, *, opened: bool = False) -> None:
        self._thinking, self._held = opened, ""

    def feed(self, text: str, *, last: bool = False) -> list[tuple[Literal["thoughts", "answer"], str]]:
        """Give a new piece of text; get back what is settled, each piece with its kind."""
        pieces: list[tuple[Literal["thoughts", "answer"], str]] = []
        self._held += text
        while True:
            tag = END_THINK if self._thinking else THINK
            kind: Literal["thoughts", "answer"] = "thoughts" if self._thinking else "answer"
            before, found, after = self._held.partition(tag)
            if found:
                if before:
                    pieces.append((kind, before))
                self._thinking, self._held = not self._thinking, after
                continue
            kept = 0 if last else beginning_at_end(self._held, (tag,))
            ready = self._held[: len(self._held) - kept]
            if ready:
                pieces.append((kind, ready))
            self._held = self._held[len(ready) :]
            return pieces


def beginning_at_end(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of the text may be the beginning of one of the marks."""
    longest = 0
    for mark in marks:
        for length in range(min(len(mark) - 1, len(text)), longest, -1):
            if text.endswith(mark[:length]):
                longest = length
                break
    return longest
