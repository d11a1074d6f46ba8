"""Text as it arrives: whole characters only, never a piece of a stop text, thinking apart from the answer."""

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
LONGEST_CHARACTER = 8


@lru_cache(maxsize=8)
def token_texts(tokenizer: Tokenizer) -> dict[int, str] | None:
    """Where the texts of single tokens are noted; None where they depend on the tokens before."""
    return {} if isinstance(tokenizer.backend.decoder, decoders.ByteLevel) else None


class TextStream:
    """Decodes tokens one by one; `text` is what is settled, and ends before a stop text."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._texts = token_texts(tokenizer)
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
        if self._texts is not None and not self._open:
            piece = self._text_of(token)
            if not piece.endswith(BROKEN):
                self._before = [token]
                return self._release(piece, last=False)
        self._open.append(token)
        piece = self._decoded()
        if piece.endswith(BROKEN):
            if len(self._open) < LONGEST_CHARACTER:
                return ""
            self._texts = None  # what comes next may complete a character given up on
        self._before, self._open = self._open, []
        return self._release(piece, last=False)

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
        return self._release(piece, last=True)

    def _text_of(self, token: int) -> str:
        """The text of one token, decoded once for all."""
        assert self._texts is not None
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self._tokenizer.decode([token])
        return text

    def _decoded(self) -> str:
        # decoders that treat the first token of a text differently need one to stand before
        decode = self._tokenizer.decode
        return decode(self._before + self._open)[len(decode(self._before)) :]

    def _release(self, piece: str, *, last: bool) -> str:
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
