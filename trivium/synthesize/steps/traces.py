"""Traces: worked answers that ramble, repeat themselves, change language or break their form are left out."""

import re
import unicodedata
from collections import Counter
from functools import lru_cache
from typing import ClassVar

from pydantic import Field, field_validator

from trivium.curate.characters import Characters
from trivium.curate.repetition import repeated_grams, top_gram
from trivium.grade.fences import fenced_lines
from trivium.kit.numbers import Count
from trivium.synthesize.row import CANDIDATES, Row, asked_text, compared_text
from trivium.synthesize.step import Room, Step


class Traces(Step):
    """Filter answers, whether already chosen or still candidates, and count why each was left out."""

    name: ClassVar[str] = "traces"
    short: ClassVar[str] = "most_words"

    least_words: Count = Field(default=1, ge=0)
    """Answers of fewer words are too short."""
    most_words: Count | None = None
    """Answers of more words ramble."""
    other_script: float = Field(default=0.1, ge=0, le=1)
    """The most of an answer's letters that may be in scripts which its prompt does not use."""
    repeated: float = Field(default=0.3, ge=0, le=1)
    """The most of an answer that runs of five words may make up which stood in it before."""
    most_often: float = Field(default=0.5, ge=0, le=1)
    """The most of an answer that its commonest run of three words may make up, from 20 words on."""
    form: bool = True
    """Refuse thoughts, fences, and brackets of formulas that open and never close."""
    pattern: str | None = None
    """A regular expression that has to be found in the answer, as `#### -?\\\\d+`."""

    @field_validator("pattern")
    @classmethod
    def _is_pattern(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"`pattern` is no regular expression: {error}") from None
        return pattern

    def run(self, rows: list[Row], room: Room) -> list[Row]:
        kept = []
        for row in rows:
            several = row.fields.get(CANDIDATES)
            if several is None:
                why = self._trouble(row, self._text(row))
                if why is None:
                    kept.append(row)
                else:
                    room.drop(row, why)
                continue
            good = []
            for one in several:
                why = self._trouble(row, one["text"])
                if why is None:
                    good.append(one)
                else:
                    room.drop(
                        row.child(f"#{one.get('sample', 0)}", (CANDIDATES,), completion=one["text"]), why
                    )
            if good:
                kept.append(row.child(**{CANDIDATES: good}))
        return kept

    @staticmethod
    def _text(row: Row) -> str:
        written = [row.fields[name] for name in ("completion", "chosen", "text") if name in row.fields]
        return str(written[0]) if written else compared_text(row)

    def _trouble(self, row: Row, text: str) -> str | None:
        """Why an answer is left out."""
        words = Characters([text]).words
        count = len(words.hashes)
        if count < self.least_words:
            return f"too short: {count} words"
        if self.most_words is not None and count > self.most_words:
            return f"too long: {count} words"
        size = max(1, len(text))
        again = float(repeated_grams(words, [5])[5][0]) / size
        if again > self.repeated:
            return f"repeats: {again:.0%} of it stood in it before"
        often = float(top_gram(words, 3)[0]) / size if count >= 20 else 0.0
        if often > self.most_often:
            return f"repeats: one run of three words is {often:.0%} of it"
        foreign = foreign_share(text, asked_text(row))
        if foreign > self.other_script:
            return f"language: {foreign:.0%} of its letters are in a script that the prompt does not use"
        trouble = broken_form(text) if self.form else None
        if trouble is not None:
            return f"form: {trouble}"
        if self.pattern is not None and re.search(self.pattern, text) is None:
            return f"form: it does not hold {self.pattern}"
        return None


@lru_cache(1 << 16)
def _script(letter: str) -> str:
    """The script of a letter, by the first word of its name; scripts of Chinese and Japanese are one."""
    name = unicodedata.name(letter, "").split(" ")[0]
    return "CJK" if name in ("HIRAGANA", "KATAKANA", "CJK") else name


def scripts(text: str) -> Counter[str]:
    """How many letters of each script a text has."""
    return Counter(_script(letter) for letter in text if letter.isalpha())


def foreign_share(text: str, prompt: str) -> float:
    """The share of a text's letters in scripts that its prompt does not use; Greek is the script of
    formulas."""
    known = scripts(prompt)
    if not known:
        known = Counter(dict(scripts(text).most_common(1)))
    found = scripts(text)
    total = sum(found.values())
    return sum(count for name, count in found.items() if name not in known and name != "GREEK") / max(
        total, 1
    )


def broken_form(text: str) -> str | None:
    """What opens in a text and never closes."""
    for opening, closing in (("<think>", "</think>"), ("\\[", "\\]"), ("\\(", "\\)"), ("\\begin{", "\\end{")):
        if text.count(opening) != text.count(closing):
            return f"{text.count(opening)} of {opening} and {text.count(closing)} of {closing}"
    fences = sum(line.lstrip(" \t").startswith("```") for line in text.split("\n"))
    if fences % 2 or 2 * len(fenced_lines(text)) != fences:
        return "a fence never closes"
    return None
