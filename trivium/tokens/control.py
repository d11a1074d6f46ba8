"""Law L5: text never becomes a control token, because only aliases that cannot be typed become one."""

import copy
import json
import re
import secrets
from collections.abc import Iterable
from itertools import islice
from typing import Any

from tokenizers import Tokenizer as Backend

from trivium.kit.errors import TriviumError

# A noncharacter-free private-use mark plus a per-process secret: no text anybody writes contains it.
_SECRET = "\U0010fffd" + secrets.token_hex(12)
OPEN, CLOSE = _SECRET + "(", _SECRET + ")"
MARK = _SECRET + "*"
"""Stands in a text where a picture or a sound is."""
# Code points that mean nothing to anybody: private use, then planes in which nothing is assigned. A text of
# two million bytes has room for about half of them.
_MEANINGLESS = (range(0xF0000, 0xFFFFD), range(0xE000, 0xF900), range(0x40000, 0xE0000))


def alias(index: int) -> str:
    """The string that stands for control token number `index` inside this process, and nowhere else."""
    return f"{_SECRET}{index:x};"


def pattern_of(strings: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds any of the strings, the longest first; it never matches when there are none."""
    longest_first = sorted(strings, key=lambda string: (-len(string), string))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def without_control(tokenizer: dict[str, Any], control: dict[str, int]) -> tuple[Backend, int, int, int]:
    """A copy of the tokenizer in which every control token answers only to its alias.

    Also adds three tokens that cut a text without leaving a trace in its neighbours: those around what the
    assistant says and that of pictures and sounds; their ids are returned.
    """
    changed = copy.deepcopy(tokenizer)
    changed["post_processor"] = None
    changed["truncation"] = None
    changed["padding"] = None
    model = changed["model"]
    names = {content: alias(identity) for content, identity in control.items()}
    for token in changed.get("added_tokens") or []:
        token["content"] = names.get(token["content"], token["content"])
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): identity for piece, identity in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if model.get("merges"):
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [
            [left, right]
            for left, right in pairs
            if left not in names and right not in names and left + right not in names
        ]
    backend = Backend.from_str(json.dumps(changed))
    backend.add_special_tokens([OPEN, CLOSE, MARK])
    opening, closing, mark = (backend.token_to_id(one) for one in (OPEN, CLOSE, MARK))
    assert opening is not None, "just added"
    assert closing is not None, "just added"
    assert mark is not None, "just added"
    return backend, opening, closing, mark


class ControlStrings:
    """The strings of a tokenizer's control tokens, ready to be looked for."""

    def __init__(self, strings: Iterable[str]) -> None:
        known = sorted(strings)
        self.pattern = pattern_of(known)
        self.first_letters = sorted({string[0] for string in known})
        self.longest = max(map(len, known), default=0)
        self.prefixes = frozenset(string[:size] for string in known for size in range(1, len(string)))

    def begun_at(self, text: str) -> int | None:
        """Where a control string begins that the end of the text (spaces aside) leaves unfinished."""
        end = len(text.rstrip())
        sizes = range(min(end, self.longest - 1), 0, -1)
        return next((end - size for size in sizes if text[end - size : end] in self.prefixes), None)


class Disguise:
    """Hides what users typed from the search for control strings, and brings it back afterwards.

    The first letter of each control string in user text is replaced by a letter without a meaning that the
    text does not contain, so that a template can trim and split the text as usual. A control string that was
    begun at the end of one piece of text is hidden too, for the template may join pieces.
    """

    def __init__(self, control: ControlStrings, content: Any) -> None:
        self.control = control
        seen = set(json.dumps(content, ensure_ascii=False, default=str))
        codes = (code for span in _MEANINGLESS for code in span if code & 0xFFFE != 0xFFFE)
        free = (letter for letter in map(chr, codes) if letter not in seen)
        letters = list(islice(free, len(control.first_letters)))
        if len(letters) < len(control.first_letters):
            raise TriviumError(
                "The conversation holds every private-use and unassigned character there is; leave some out."
            )
        self.hidden = dict(zip(control.first_letters, letters, strict=True))
        self.shown = str.maketrans({letter: first for first, letter in self.hidden.items()})

    def hide(self, content: Any) -> Any:
        """A copy of strings, lists and dictionaries in which no control string is left."""
        if isinstance(content, str):
            return self._hide_text(content)
        if isinstance(content, dict):
            return {self.hide(key): self.hide(value) for key, value in content.items()}
        if isinstance(content, (list, tuple)):
            return [self.hide(value) for value in content]
        return content

    def _hide_text(self, text: str) -> str:
        text = self.control.pattern.sub(lambda match: self.hidden[match[0][0]] + match[0][1:], text)
        begun = self.control.begun_at(text)
        # What is hidden may have held the beginning of another one.
        while begun is not None:
            text = text[:begun] + self.hidden[text[begun]] + text[begun + 1 :]
            begun = self.control.begun_at(text)
        return self._hide_text(text) if self.control.pattern.search(text) else text

    def show(self, text: str) -> str:
        """The text with every hidden letter back in its place."""
        return text.translate(self.shown)
