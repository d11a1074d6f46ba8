"""Judge: a model scores answers by a rubric, or compares them two by two in both orders; calibrated first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from trivium.data.sources import Source, read_documents
from trivium.generate.asking.rubric import ENDING, score_in
from trivium.kit.errors import TriviumError
from trivium.kit.numbers import Count
from trivium.kit.settings import Settings
from trivium.synthesize.calibration import FEWEST, Bounds, Pair, Verdict, calibrated, refuse, sentence
from trivium.synthesize.prompted import PromptedStep, Wanted
from trivium.synthesize.row import CANDIDATES, Messages, Row, asked, prompt_text
from trivium.synthesize.step import Room
from trivium.synthesize.steps.verify import Scorers, Verify

RUBRIC = "It is correct, complete, to the point, and does what was asked."
TEMPLATES = {
    "rubric": (
        "Judge an answer by this rubric: {{ rubric }}\n\nThe request:\n{{ request }}\n\nThe answer:\n"
        "{{ candidate }}\n\nGive a whole number from {{ low }} (bad) to {{ high }} (as good as can be). "
        + ENDING
    ),
    "pairwise": (
        "Compare two answers by this rubric: {{ rubric }}\n\nThe request:\n{{ request }}\n\nAnswer A:\n"
        "{{ first }}\n\nAnswer B:\n{{ second }}\n\nWhich is better? Neither their order nor their length "
        "counts. "
        "End with the line `Better: A` or `Better: B`."
    ),
}
_BETTER = re.compile(r"Better\W*([AB])\b", re.I)
NOTHING = "no verdict: the judge did not say which"


class Calibration(Settings):
    """Pairs with a known better answer, on which a judge is tried before it judges."""

    by: Scorers | None = None
    """Scorers that label this stage's own answers, as `math`: a right and a wrong one to a prompt are a
    pair."""
    data: str | None = None
    """Rows with `prompt`, `chosen` and `rejected`: a file, a folder, or a stage that makes data."""
    pairs: Count = Field(default=100, ge=FEWEST)
    """On so many pairs at most."""

    @model_validator(mode="after")
    def _one_way(self) -> Calibration:
        if (self.by is None) == (self.data is None):
            raise ValueError("`calibrate` takes `by` (scorers) or `data` (pairs)")
        return self


class Judge(PromptedStep):
    """Score the answers of every row by a model; refused where it does not agree with what a program
    knows."""

    name: ClassVar[str] = "judge"
    short: ClassVar[str] = "how"

    how: Literal["rubric", "pairwise"] = "rubric"
    """Each answer alone by a rubric, or every two answers to a prompt in both orders."""
    rubric: str = RUBRIC
    """What a good answer is."""
    scale: tuple[int, int] = (1, 10)
    """The lowest and the highest score of a rubric."""
    least: float | None = None
    """Keep a row only if its best answer has at least this score (pairwise: share of comparisons won)."""
    every: bool = False
    """Keep all answers with their scores for `pairs`; else the best one."""
    calibrate: Calibration | Literal["none"]
    """What the judge is tried on first; `none` takes it at its word."""
    bounds: Bounds = Bounds()
    """From when on the judge is refused."""
    max_new_tokens: Count = Field(default=256, ge=1)
    """The longest verdict in tokens."""
    temperature: float = Field(default=0.0, ge=0)
    """The sampling temperature; 0 is greedy."""
    cut: bool = True
    """Read verdicts that were cut off at `max_new_tokens`, too."""

    _facts: dict[str, Any] = PrivateAttr(default_factory=dict)
    _place: str | None = PrivateAttr(default=None)

    def mentions(self) -> list[tuple[str, str, tuple[str, ...]]]:
        found = super().mentions()
        if isinstance(self.calibrate, Calibration) and self.calibrate.data is not None:
            found.append(("calibrate.data", self.calibrate.data, ("data", "source")))
        if (labels := self._labels()) is not None:
            found += [(f"calibrate.{setting}", name, needs) for setting, name, needs in labels.mentions()]
        return found

    def _labels(self) -> Verify | None:
        """The scorers that say which of this stage's own answers are right."""
        by = self.calibrate.by if isinstance(self.calibrate, Calibration) else None
        return None if by is None else Verify(by=by, every=True)

    def check(self, base: Path) -> None:
        if (labels := self._labels()) is not None:
            labels.check(base)

    def answers(self, rows: float) -> tuple[float, float, int]:
        # Four candidates are usual; how many there really are only the run knows.
        return rows, rows * (12 if self.how == "pairwise" else 4), self.max_new_tokens

    def facts(self) -> dict[str, Any]:
        return self._facts

    def run(self, rows: list[Row], room: Room) -> list[Row]:
        if isinstance(self.calibrate, Calibration) and not self._facts and rows:
            self._try(self.calibrate, rows, room)
        several = [
            row.fields.get(CANDIDATES) or [{"text": str(row.fields.get("completion", ""))}] for row in rows
        ]
        requests = [
            (asked(row), [one["text"] for one in some]) for row, some in zip(rows, several, strict=True)
        ]
        scores = self._scores(requests, room)
        kept = []
        for row, some, found in zip(rows, several, scores, strict=True):
            judged = [{**one, "score": score} for one, score in zip(some, found, strict=True)]
            known = [one for one in judged if one["score"] is not None]
            best = max(known, key=lambda one: one["score"], default=None)
            row.note(self.name, **self.source(room, how=self.how, scores=found))
            if best is None:
                room.drop(row, NOTHING)
            elif self.least is not None and best["score"] < self.least:
                room.drop(row, f"judged bad: {best['score']:g} is less than {self.least:g}")
            elif self.every:
                kept.append(row.child("", ("completion",), **{CANDIDATES: known}))
            else:
                kept.append(row.child("", (CANDIDATES,), completion=best["text"], score=best["score"]))
        return kept

    def _scores(
        self, requests: Sequence[tuple[Messages, Sequence[str]]], room: Room
    ) -> list[list[float | None]]:
        """A score of every answer to every request."""
        if self.how == "rubric":
            wanted = [self._alone(messages, text) for messages, some in requests for text in some]
            found = iter([score_in(reply.text, self.scale) for reply in self.replies(wanted, room)])
            return [[next(found) for _ in some] for _, some in requests]
        wanted = [self._two(messages, *two) for messages, some in requests for two in permutations(some, 2)]
        said = iter([_first_wins(reply.text) for reply in self.replies(wanted, room)])
        scores: list[list[float | None]] = []
        for _, some in requests:
            won: list[list[float]] = [[] for _ in some]
            for one, other in permutations(range(len(some)), 2):
                first = next(said)
                if first is not None:
                    won[one].append(first)
                    won[other].append(1 - first)
            scores.append([sum(mine) / len(mine) if mine else None for mine in won])
        return scores

    def _alone(self, messages: Messages, text: str) -> Wanted:
        low, high = self.scale
        return self._filled(messages, candidate=text, low=low, high=high)

    def _two(self, messages: Messages, first: str, second: str) -> Wanted:
        return self._filled(messages, first=first, second=second)

    def _filled(self, messages: Messages, **columns: Any) -> Wanted:
        row = Row("judged", {"prompt": messages})
        return Wanted(row, {"request": prompt_text(row), "rubric": self.rubric, **columns})

    @model_validator(mode="after")
    def _has_a_template(self) -> Judge:
        if not self.template:
            self.template = TEMPLATES[self.how]
        return self

    def _try(self, how: Calibration, rows: list[Row], room: Room) -> None:
        """Let the judge rank pairs whose better answer is known, print what it is worth, refuse it if bad."""
        pairs = (self._read(how, room) if how.data is not None else self._labelled(rows, room))[: how.pairs]
        if len(pairs) < FEWEST:
            raise TriviumError(
                f"`judge`: {len(pairs)} pairs of a right and a wrong answer are too few to calibrate on; it "
                f"needs "
                f"{FEWEST}: raise `per_round` or `samples`, or give pairs as `calibrate: {{data: ...}}`."
            )
        verdicts = []
        if self.how == "rubric":
            scores = self._scores([(pair.prompt, [pair.better, pair.worse]) for pair in pairs], room)
            verdicts = [Verdict(*(self.scale[0] if one is None else one for one in some)) for some in scores]
        else:
            wanted = [self._two(pair.prompt, *two) for pair in pairs
                      for two in ((pair.better, pair.worse), (pair.worse, pair.better))]  # fmt: skip
            said = [_first_wins(reply.text) for reply in self.replies(wanted, room)]
            shown = [0.5 if one is None else one for one in said]
            for one, other in zip(shown[::2], shown[1::2], strict=True):
                score = (one + 1 - other) / 2
                verdicts.append(Verdict(score, 1 - score, (one + other) / 2))
        self._facts = calibrated(pairs, verdicts)
        name = room.teacher().name
        room.say(f"judge {name}: {sentence(self._facts)}")
        refuse(self._facts, self.bounds, name)

    def _labelled(self, rows: list[Row], room: Room) -> list[Pair]:
        """A right and a wrong answer to each prompt that has both."""
        verify = self._labels()
        assert verify is not None
        inside = Room(room.asker, room.seed, room.say, room.base, room.scratch, where=room.where)
        pairs = []
        for row in verify.run(
            [row.child() for row in rows if len(row.fields.get(CANDIDATES, [])) > 1], inside
        ):
            labelled = [one for one in row.fields[CANDIDATES] if one["score"] is not None]
            right = [one["text"] for one in labelled if one["score"] >= verify.least]
            wrong = [one["text"] for one in labelled if one["score"] < verify.least]
            if right and wrong:
                pairs.append(Pair(asked(row), right[0], wrong[0]))
        return pairs

    def _read(self, how: Calibration, room: Room) -> list[Pair]:
        assert how.data is not None
        pairs = []
        for document in read_documents(Source(path=str(room.where.get(how.data, how.data)), limit=how.pairs)):
            both = [document.fields.get(name) for name in ("chosen", "rejected")]
            texts = [one[-1]["content"] if isinstance(one, list) and one else one for one in both]
            if not all(isinstance(text, str) for text in texts):
                raise TriviumError(
                    f"{document.id}: a pair to calibrate on has `prompt`, `chosen` and `rejected`."
                )
            pairs.append(Pair(asked(Row(document.id, document.fields)), str(texts[0]), str(texts[1])))
        return pairs


def _first_wins(text: str) -> float | None:
    """1 where the first answer was found better, 0 where the second."""
    found = _BETTER.findall(text)
    return float(found[-1].upper() == "A") if found else None
