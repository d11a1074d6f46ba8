"""Word problems whose every step can be checked, with one family of problems kept for the test."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from trivium.kit.errors import TriviumError
from trivium.world.chance import Chance, split_of
from trivium.world.country import country_of
from trivium.world.document import Question, Share, Split, WorldDocument
from trivium.world.mistakes import labels, with_mistake
from trivium.world.words import sentences


@dataclass(frozen=True)
class Family:
    """One kind of story, told in its own words, over one running number."""

    name: str
    people: int
    things: tuple[str, ...]
    openings: tuple[str, ...]
    events: dict[str, tuple[str, ...]]
    questions: tuple[str, ...]


def _families(which: str) -> tuple[Family, ...]:
    return tuple(
        Family(
            name=name,
            people=one["people"],
            things=tuple(one["things"]),
            openings=tuple(one["openings"]),
            events={operation: tuple(told) for operation, told in one["events"].items()},
            questions=tuple(one["questions"]),
        )
        for name, one in sentences("problems")[which].items()
    )


FAMILIES = _families("families")
(UNSEEN,) = _families("unseen")


MOST_STEPS = 100
_SPLIT_SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


@dataclass(frozen=True)
class Options:
    """How hard the problems are, which family they come from, and in which form they are written.

    `at_once` is the share of chats that give the answer without working it out, as people do who are asked;
    `wrong` that of solutions step by step (`form=steps`) that have a mistake.
    """

    country: int = 0
    steps_low: int = 1
    steps_high: int = 4
    largest: int = 50
    form: str = "document"
    ending: str = "####"
    family: str = "all"
    at_once: Share = 0.0
    wrong: Share = 0.5


@dataclass(frozen=True)
class Problem:
    """One word problem with the worked steps and the answer."""

    question: str
    steps: tuple[str, ...]
    answer: int
    family: str
    bits: float

    def close(self, ending: str) -> str:
        """The answer in its fixed form."""
        return f"#### {self.answer}" if ending == "####" else f"The answer is {self.answer}."

    def solution(self, ending: str) -> str:
        """The worked steps, line by line, and the answer in its fixed form."""
        return "\n".join((*self.steps, self.close(ending)))


@lru_cache(maxsize=65536)
def _operands(total: int, sign: str, largest: int, split: Split) -> tuple[int, ...]:
    """The second numbers that keep the result in range; a pair of two-digit numbers belongs to one split."""
    if sign == "*":
        return tuple(times for times in (2, 3) if total * times <= largest)
    low, high = (2, min(20, largest - total)) if sign == "+" else (2, min(20, total - 1))
    return tuple(
        other
        for other in range(low, high + 1)
        if total < 10 or other < 10 or split_of("pair", *sorted((total, other)), sign) == split
    )


@lru_cache(maxsize=65536)
def _moves(total: int, largest: int, split: Split) -> tuple[str, ...]:
    # Doubling is rarer than adding, as in life: it is listed once and the others twice.
    return tuple(sign for sign in "++--*" if _operands(total, sign, largest, split))


def _numbers(chance: Chance, split: Split, options: Options) -> tuple[int, list[tuple[str, int]]]:
    # A whole sequence of numbers belongs to one split, in every family: no test problem is a renamed one
    # of train. What is rejected makes what is left likelier by the same factor, so its bits are fewer.
    before = chance.bits
    while True:
        chance.bits = before + math.log2(_SPLIT_SHARES[split])
        start = chance.between(2, min(20, options.largest))
        total, moves = start, []
        for _ in range(chance.between(options.steps_low, options.steps_high)):
            signs = _moves(total, options.largest, split)
            sign = chance.pick(signs)
            chance.bits -= math.log2(signs.count(sign))
            other = chance.pick(_operands(total, sign, options.largest, split))
            moves.append((sign, other))
            total = {"+": total + other, "-": total - other, "*": total * other}[sign]
        if split_of("sums", start, moves) == split:
            return start, moves


def _family(chance: Chance, split: Split, options: Options) -> Family:
    if options.family == "all":
        return chance.pick(FAMILIES if split == "train" else (*FAMILIES, UNSEEN))
    if options.family == "seen":
        return chance.pick(FAMILIES)
    named = {family.name: family for family in (*FAMILIES, UNSEEN)}
    if options.family == "unseen":
        named["unseen"] = UNSEEN
    if options.family not in named:
        raise TriviumError(
            f"world:sums has no family '{options.family}'; it has all, seen, unseen, {', '.join(named)}."
        )
    if split == "train" and named[options.family] is UNSEEN:
        raise TriviumError(
            f"The family '{UNSEEN.name}' of world:sums is kept for the test; train cannot use it."
        )
    return named[options.family]


def problem(index: int, split: Split, seed: int, options: Options) -> Problem:
    """Problem number `index` of a split."""
    if not 1 <= options.steps_low <= options.steps_high <= MOST_STEPS or options.largest < 10:
        raise TriviumError(
            f"world:sums needs 1 <= steps_low <= steps_high <= {MOST_STEPS} and largest >= 10."
        )
    chance = Chance("sums", split, seed, index)
    family = _family(chance, split, options)
    start, moves = _numbers(chance, split, options)
    names = chance.sample(country_of(options.country, 1).first_names, family.people)
    thing = chance.pick(family.things)
    words = {"thing": thing, **{f"name{place}": name for place, name in enumerate(names)}}
    sentences = [chance.pick(family.openings).format(number=start, **words)]
    steps, total = [], start
    for sign, other in moves:
        sentences.append(chance.pick(family.events[sign]).format(number=other, **words))
        result = {"+": total + other, "-": total - other, "*": total * other}[sign]
        steps.append(f"{total} {sign} {other} = {result}")
        total = result
    sentences.append(chance.pick(family.questions).format(**words))
    return Problem(" ".join(sentences), tuple(steps), total, family.name, chance.bits)


def write(index: int, split: Split, seed: int, options: Options) -> WorldDocument:
    """One problem as a document, as a chat to learn from, as a prompt with its answer, or step by step."""
    one = problem(index, split, seed, options)
    solution = one.solution(options.ending)
    truth = {
        "answer": one.answer,
        "steps": list(one.steps),
        "family": one.family,
        "bits": one.bits,
        "check": "sum",
        "arguments": {"answer": one.answer},
    }
    if options.form == "document":
        return WorldDocument("", f"Question: {one.question}\nAnswer: {solution}", truth=truth)
    asked = {"role": "user", "content": one.question}
    if options.form == "chat":
        if Chance("sums at once", split, seed, index).happens(options.at_once):
            solution = one.close(options.ending)
        messages = [asked, {"role": "assistant", "content": solution}]
        return WorldDocument("", None, {"messages": messages}, truth)
    if options.form == "prompt":
        return WorldDocument("", None, {"prompt": [asked], "answer": str(one.answer)}, truth)
    if options.form == "steps":
        right, chance = solution.splitlines(), Chance("sums wrong", split, seed, index)
        written = right
        if chance.happens(options.wrong):
            steps, total = with_mistake(one.steps, chance, max(99, options.largest))
            written = [*steps, replace(one, answer=total).close(options.ending)]
        fields = {"prompt": [asked], "completions": written, "labels": labels(written, right)}
        return WorldDocument("", None, {**fields, "answer": str(one.answer)}, truth)
    raise TriviumError(f"world:sums has no form '{options.form}'; use document, chat, prompt or steps.")


def ask(index: int, split: Split, seed: int, options: Options) -> Question:
    """The problem to solve; a base model continues the document that asks it."""
    one = problem(index, split, seed, options)
    return Question(
        id="",
        prompt=f"Question: {one.question}\nAnswer:",
        question=one.question,
        answer=one.solution(options.ending),
        check={"check": "sum", "arguments": {"answer": one.answer}},
        truth={
            "answer": one.answer,
            "steps": len(one.steps),
            "family": one.family,
            "unseen": one.family == UNSEEN.name,
        },
    )
