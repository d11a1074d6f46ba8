"""An answer on the terminal: thoughts dim and apart, the answer as it is."""

from __future__ import annotations

from typing import TextIO
from unicodedata import category

from trivium.generate.streaming import ReasoningStream

DIM, PLAIN = "\x1b[2m", "\x1b[22m"


def printable(text: str) -> str:
    """Text without the control characters with which a model could write elsewhere on a terminal."""
    return "".join(letter for letter in text if letter in "\n\t" or category(letter) != "Cc")


class Voice:
    """Writes a model's text as it arrives, and keeps what of it is the answer."""

    def __init__(self, out: TextIO, *, opened: bool) -> None:
        """`opened`: the prompt ends inside the model's thoughts."""
        self._out, self._reasoning = out, ReasoningStream(opened=opened)
        self._before, self._after = (DIM, PLAIN) if out.isatty() else ("[thoughts] ", "")
        self._between = "\n" if out.isatty() else "\n[answer] "
        self._said: list[str] = []
        self._thinking, self._fresh = False, False
        self.thought = False

    @property
    def answer(self) -> str:
        """What was said, thoughts aside."""
        return "".join(self._said)

    def hear(self, text: str, *, last: bool = False) -> None:
        """Write what is settled."""
        for kind, piece in self._reasoning.feed(text, last=last):
            thinking = kind == "thoughts"
            if thinking != self._thinking:
                self._out.write(self._before if thinking else f"{self._after}{self._between}")
                self._thinking, self._fresh = thinking, True
                self.thought |= thinking
            if self._fresh:
                piece = piece.lstrip()
            if not piece:
                continue
            self._fresh = False
            if not thinking:
                self._said.append(piece)
            self._out.write(printable(piece))
        if last and self._thinking:
            self._out.write(self._after)
        self._out.flush()
