"""Cutting an answer into tokens, and finding where it comes apart outside every bracket."""

import re
from dataclasses import dataclass

from trivium.grade.maths.notation import LONGEST_ANSWER, tidy

MOST_TOKENS = 400
_OPENING = frozenset({"(", "[", "{", "\\{"})
_CLOSING = frozenset({")", "]", "}", "\\}"})
_GROUPED = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])|\d{1,3}(?: \d{3})+(?![\d/ ])"
_PLAIN = r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?(?![\d])|\.\d+(?:[eE][+-]?\d+)?"
_REST = r'|"[^"]*"|\\\\|\\[A-Za-z]+|\\[{}|]|[A-Za-z]+|\.\.\.|[-+*/^_=<>(){}\[\],;:|!%&\'?]'
_OUTSIDE = re.compile(f"(?:{_GROUPED})|(?:{_PLAIN}){_REST}")
_INSIDE = re.compile(f"(?:{_PLAIN}){_REST}")


class Unreadable(Exception):
    """The text is not an answer this grader can read."""


@dataclass(frozen=True)
class Token:
    """A piece of an answer, and whether a space stood before it."""

    text: str
    spaced: bool = False

    @property
    def kind(self) -> str:
        first = self.text[0]
        if first.isdigit() or (first == "." and len(self.text) > 1 and self.text[1].isdigit()):
            return "number"
        if first == '"':
            return "words"
        if first == "\\" and self.text[1:].isalpha():
            return "command"
        return "letters" if first.isalpha() else "sign"


Tokens = list[Token]


def cut(text: str) -> Tokens:
    """The tokens of an answer, after `tidy`."""
    if len(text) > LONGEST_ANSWER:
        raise Unreadable("the answer is too long")
    text = re.sub(r"(?<=\d)\\comma (?=\d{3})", "", tidy(text)).replace("\\comma ", ",")
    tokens: Tokens = []
    position = depth = 0
    while position < len(text):
        if text[position] == " ":
            position += 1
            continue
        # Inside brackets a comma parts items, so 100,200 there is two numbers; outside it is one.
        match = (_INSIDE if depth else _OUTSIDE).match(text, position)
        if match is None:
            raise Unreadable(f"{text[position]!r} has no meaning here")
        word = match[0]
        depth += (word in _OPENING) - (word in _CLOSING)
        if word[0].isdigit():
            word = word.replace(",", "").replace(" ", "")
        tokens.append(Token(word, position > 0 and text[position - 1] == " "))
        position = match.end()
        if len(tokens) > MOST_TOKENS:
            raise Unreadable("the answer is too long")
    return tokens


def split(tokens: Tokens, separators: frozenset[str]) -> tuple[list[Tokens], list[str]]:
    """The parts between separators that stand outside every bracket, and those separators."""
    parts: list[Tokens] = [[]]
    found: list[str] = []
    depth = 0
    for token in tokens:
        depth += (token.text in _OPENING) - (token.text in _CLOSING)
        if depth < 0:
            raise Unreadable("a bracket closes that never opened")
        if depth == 0 and token.text in separators:
            found.append(token.text)
            parts.append([])
        else:
            parts[-1].append(token)
    if depth:
        raise Unreadable("a bracket never closes")
    return parts, found


def enclosed(tokens: Tokens) -> tuple[str, Tokens, str] | None:
    """Opening bracket, inside and closing bracket where one pair holds the whole answer."""
    if len(tokens) < 2 or tokens[0].text not in _OPENING or tokens[-1].text not in _CLOSING:
        return None
    depth = 0
    for place, token in enumerate(tokens):
        depth += (token.text in _OPENING) - (token.text in _CLOSING)
        if depth == 0 and place < len(tokens) - 1:
            return None
    return tokens[0].text, tokens[1:-1], tokens[-1].text
