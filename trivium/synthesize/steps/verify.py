"""Verify: answers that a program finds right are kept; the share of them says how hard the question is.

Right may also be what most answers say (self-consistency, Wang et al., 2022). Tests that a model wrote are
not believed before they have failed a program that does nothing.
"""

import ast
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, PrivateAttr

from trivium.grade.code import TESTS_COLUMNS, CodeScorer, program_of, read_tests
from trivium.grade.maths.extract import after_thinking, marked_answers
from trivium.grade.maths.scorer import MathScorer
from trivium.grade.rewards import Combined, combine, ready_scorers, with_models
from trivium.kit.errors import TriviumError
from trivium.kit.numbers import Count
from trivium.synthesize.row import CANDIDATES, Row, asked
from trivium.synthesize.step import Room, Step

AGREEMENT = "agreement"
Scorers = Annotated[
    list[str | dict[str, Any]],
    BeforeValidator(lambda value: [value] if isinstance(value, str | dict) else value),
]


class Verify(Step):
    """Score every answer with the scorers that reinforcement learning has, and keep those that are right."""

    name: ClassVar[str] = "verify"
    short: ClassVar[str] = "by"

    by: Scorers = Field(min_length=1)
    """Scorers as under `reward`: math, steps, code, sql, format, instructions, file.py:function; and
    `agreement`: right is what most of a prompt's answers say."""
    least: float = 1.0
    """The score from which an answer is right, summed over the scorers with their weights."""
    band: tuple[float, float] = (0.0, 1.0)
    """Keep a prompt only if the share of its answers that are right lies in here, ends included."""
    keep: Count = Field(default=1, ge=1)
    """How many right answers to a prompt are kept, each as a row; those that differ first."""
    every: bool = False
    """Keep all answers with their scores, right or wrong, for `pairs`."""

    _scorers: Combined | None = PrivateAttr(default=None)

    @property
    def agrees(self) -> bool:
        """Whether answers are compared with one another."""
        return AGREEMENT in self.by

    def _named(self) -> list[str | dict[str, Any]]:
        return [one for one in self.by if one != AGREEMENT]

    def mentions(self) -> list[tuple[str, str, tuple[str, ...]]]:
        found: list[tuple[str, str, tuple[str, ...]]] = []
        for place, one in enumerate(self._named()):
            name = one if isinstance(one, str) else str(one.get("name", ""))
            if isinstance(one, dict) and isinstance(one.get("model"), str):
                found.append((f"by.{place}.model", one["model"], ("reward",)))
            elif ":" in name:
                found.append(("by", name.rpartition(":")[0], ("source",)))
        return found

    def check(self, base: Any) -> None:
        ready_scorers(self._named())

    def answers(self, rows: float) -> tuple[float, float, int]:
        return rows * self.keep, 0.0, 0

    def run(self, rows: list[Row], room: Room) -> list[Row]:
        if self._scorers is None and self._named():
            self._scorers = combine(with_models(self._named(), room.where.__getitem__), room.base)
        checked = []
        for row in rows:
            trouble = trouble_of_tests(row) if "code" in self._named() else None
            if trouble is not None:
                room.drop(row, trouble)
            else:
                checked.append(row)
        scored = self._scored(checked)
        kept = []
        for row, found in zip(checked, scored, strict=True):
            kept += self._kept(row, found, room)
        return kept

    def _scored(self, rows: Sequence[Row]) -> list[list[dict[str, Any]]]:
        """For each row its answers, each {text, score, reason}; a scorer's own fault makes no score."""
        several = [row.fields.get(CANDIDATES) or [{"text": row.fields.get("completion", "")}] for row in rows]
        found = [[{**one, "score": 0.0, "reason": ""} for one in some] for some in several]
        if self._scorers is not None and rows:
            flat = [(row, one) for row, some in zip(rows, found, strict=True) for one in some]
            names = sorted({name for row in rows for name in row.fields if name not in _NO_COLUMNS})
            columns = {name: [row.fields.get(name) for row, _ in flat] for name in names}
            prompts = [_asked_or_empty(row) for row, _ in flat]
            parts = self._scorers.scores(prompts, [one["text"] for _, one in flat], **columns)
            for place, (_, one) in enumerate(flat):
                scores = [part[place] for part in parts]
                one["score"] = self._scorers.total([[score.value] for score in scores])[0]
                one["reason"] = "; ".join(score.reason for score in scores)
        if self.agrees:
            for row, some in zip(rows, found, strict=True):
                said, members = majority([one["text"] for one in some])
                row.fields.setdefault("answer", said)
                for place, one in enumerate(some):
                    agrees = place in members
                    if one["score"] is not None:
                        one["score"] += float(agrees) if not self._named() else 0.0 if agrees else -1.0
                    one["reason"] = one["reason"] or f"{len(members)} of {len(some)} answers say {said!r}"
        return found

    def _kept(self, row: Row, found: list[dict[str, Any]], room: Room) -> list[Row]:
        right = [one for one in found if one["score"] is not None and one["score"] >= self.least]
        share = len(right) / len(found)
        row = row.child(difficulty=round(1 - share, 4))
        by = [one if isinstance(one, str) else str(one.get("name")) for one in self.by]
        row.note(self.name, by=by, answers=len(found), right=len(right))
        low, high = self.band
        if not low <= share <= high:
            room.drop(row, f"outside the band: {share:.2f} of {len(found)} answers are right")
            return []
        if self.every:
            row.fields[CANDIDATES] = found
            return [row]
        for place, one in enumerate(found):
            if one not in right:
                answer = row.child(f"#{place}", (CANDIDATES,), completion=one["text"], score=one["score"])
                room.drop(answer, f"{'not judged' if one['score'] is None else 'wrong'}: {one['reason']}")
        different = list({one["text"]: one for one in right}.values())[: self.keep]
        return [
            row.child(
                f"#{place}" if len(different) > 1 else "", (CANDIDATES,), completion=one["text"],
                score=one["score"],
            )
            for place, one in enumerate(different)
        ]  # fmt: skip


_NO_COLUMNS = (CANDIDATES, "completion", "prompt", "messages", "score", "difficulty")


def _asked_or_empty(row: Row) -> Any:
    prompt = row.fields.get("prompt")
    return prompt if prompt is not None else asked(row)


_SCORER = MathScorer()


def stated(text: str) -> str:
    """The answer that a text gives: the last it marks, else all of it in one line."""
    spoken = after_thinking(text)
    marked = marked_answers(spoken) if spoken is not None else None
    if marked is not None and marked.answers:
        return marked.answers[-1].strip()
    return " ".join((spoken or "").split())


def majority(texts: Sequence[str]) -> tuple[str, set[int]]:
    """The commonest answer and who gives it; of equally common ones the first. Nothing said agrees with
    none."""
    groups: list[tuple[str, set[int]]] = []
    for place, text in enumerate(texts):
        said = stated(text)
        if not said:
            continue
        for known, members in groups:
            if said == known or _SCORER.compare(said, known).value == 1.0:
                members.add(place)
                break
        else:
            groups.append((said, {place}))
    return max(groups, key=lambda group: (len(group[1]), -min(group[1])), default=("", set()))


_EMPTY = ("return None", "return 0", "return ''", "return []", "return True")


@lru_cache(1)
def _scorer() -> CodeScorer:
    return CodeScorer()


def trouble_of_tests(row: Row) -> str | None:
    """Why a row's tests prove nothing; None where they were not written by a model, or do."""
    name = next((name for name in TESTS_COLUMNS if name in row.fields), None)
    written = any("tests" in entry.get("wrote", ()) for entry in row.provenance)
    if name is None or not written:
        return None
    tests = row.fields[name]
    if isinstance(tests, str):
        tests = program_of(tests) or tests
        try:
            tree = ast.parse(tests)
        except (SyntaxError, ValueError, RecursionError) as error:
            return f"tests: they are no Python ({error})"
        if not any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
            return "tests: they assert nothing"
        row.fields[name] = tests
    try:
        exam = read_tests(tests, row.fields.get("entry_point"), row.fields.get("prelude") or "")
    except TriviumError as error:
        return f"tests: {error}"
    candidates = row.fields.get(CANDIDATES) or [{"text": str(row.fields.get("completion", ""))}]
    functions = sorted({one for candidate in candidates for one in _functions(candidate["text"])})
    for body in _EMPTY:
        stub = "\n".join(f"def {one}(*arguments, **named):\n    {body}" for one in functions) or "pass"
        score = _scorer().run(stub, exam)
        if score.status == "gold_bad":
            return f"tests: {score.reason}"
        if score.value == 1.0:
            return f"tests: a program passes them whose functions only `{body}`"
    return None


def _functions(text: str) -> set[str]:
    """The functions that a program defines."""
    try:
        tree = ast.parse(program_of(text) or "")
    except (SyntaxError, ValueError, RecursionError):
        return set()
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
