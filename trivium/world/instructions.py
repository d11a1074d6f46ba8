"""The kinds of instructions: what is asked, one right answer, and the check that every right one passes."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trivium.world.chance import Chance, split_of
from trivium.world.country import Country, draw_rank
from trivium.world.document import Split
from trivium.world.words import ANIMALS, CRAFTS, GOODS, LOOKS, THINGS


@dataclass(frozen=True)
class Task:
    """One instruction with an answer that fulfils it; tasks with the same key ask for the same."""

    kind: str
    key: str
    asked: str
    answer: str
    check: str
    arguments: dict[str, Any]
    system: str = ""
    asked_in: Split | None = None

    @property
    def checked(self) -> dict[str, Any]:
        return {"check": self.check, "arguments": self.arguments}


Make = Callable[[Chance, Country], Task]
_POOLS = {"animals": ANIMALS, "crafts": CRAFTS, "goods": GOODS, "things": THINGS}
_NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
_STARTS = ("Today", "Then", "Here", "Now", "Maybe", "Again")


def pair_key(first: int, second: int) -> str:
    """What two sums of the same numbers share, whatever their order."""
    return " ".join(map(str, sorted((first, second))))


def _thing_phrase(chance: Chance, count: int) -> str:
    """Exactly `count` words about a thing."""
    look, thing = chance.pick(LOOKS), chance.pick(THINGS)
    other = chance.pick([one for one in LOOKS if one != look])
    return {
        2: f"{look} {thing}",
        3: f"the {look} {thing}",
        4: f"the {look} {other} {thing}",
        5: f"I see the {look} {thing}",
    }[count]


def _repeat(chance: Chance, land: Country) -> Task:
    word, times = chance.pick(THINGS + ANIMALS), chance.between(2, 5)
    asked = chance.pick((f'Say the word "{word}" {times} times.', f'Repeat "{word}" {times} times.'))
    return Task(
        "repeat",
        f"{word} {times}",
        asked,
        " ".join([word] * times),
        "repeat",
        {"repeated": word, "times": times},
    )


def _capitals(chance: Chance, land: Country) -> Task:
    words = f"{chance.pick(LOOKS)} {chance.pick(THINGS)}"
    asked = chance.pick((f'Write "{words}" in capital letters.', f'Put "{words}" in capitals.'))
    arguments = {
        "checks": [{"check": "equals", "arguments": {"answer": words.upper()}}, {"check": "capitals"}]
    }
    return Task("capitals", words, asked, words.upper(), "all", arguments)


def _alphabet(chance: Chance, land: Country) -> Task:
    pool = _POOLS[chance.pick(tuple(_POOLS))]
    drawn = chance.sample(pool, 3)
    items = sorted(drawn)
    asked = (
        chance.pick(("Put in alphabetical order: ", "List in alphabetical order: ")) + ", ".join(drawn) + "."
    )
    return Task("alphabet", " ".join(items), asked, ", ".join(items), "order", {"items": items})


def _backwards(chance: Chance, land: Country) -> Task:
    pool = _POOLS[chance.pick(tuple(_POOLS))]
    drawn = chance.sample(pool, chance.between(2, 4))
    asked = chance.pick(("Write in reverse order: ", "List backwards: ")) + ", ".join(drawn) + "."
    return Task(
        "backwards", " ".join(sorted(drawn)), asked, ", ".join(drawn[::-1]), "order", {"items": drawn[::-1]}
    )


def _exact_words(chance: Chance, land: Country) -> Task:
    count = chance.between(2, 5)
    about = chance.pick(THINGS)
    asked = chance.pick(
        (
            f"Answer in exactly {_NUMBERS[count]} words: what is in the {about}?",
            f"In exactly {_NUMBERS[count]} words, what lies by the {about}?",
        )
    )
    return Task("words", f"{count} {about}", asked, _thing_phrase(chance, count), "words", {"count": count})


def _starts(chance: Chance, land: Country) -> Task:
    start, thing, craft = chance.pick(_STARTS), chance.pick(THINGS), chance.pick(CRAFTS)
    asked = f'Start with "{start}" and tell me about the {thing} of the {craft}.'
    checks = [
        {"check": "starts", "arguments": {"with_text": start}},
        {"check": "contains", "arguments": {"texts": [thing]}},
    ]
    return Task(
        "start",
        f"{start} {thing} {craft}",
        asked,
        f"{start} the {craft} has the {thing}.",
        "all",
        {"checks": checks},
    )


def _ends(chance: Chance, land: Country) -> Task:
    thing, craft = chance.pick(THINGS), chance.pick(CRAFTS)
    asked = chance.pick(
        (f'Write about a {craft}. End with "{thing}".', f'End with "{thing}". Tell of a {craft}.')
    )
    checks = [
        {"check": "ends", "arguments": {"with_text": thing}},
        {"check": "contains", "arguments": {"texts": [craft]}},
    ]
    return Task("end", f"{thing} {craft}", asked, f"The {craft} has a {thing}.", "all", {"checks": checks})


def _contains(chance: Chance, land: Country) -> Task:
    first, second = chance.sample(THINGS, 2)
    asked = chance.pick(
        (
            f'Write a sentence with the words "{first}" and "{second}".',
            f'Use "{first}" and "{second}" in one sentence.',
        )
    )
    key, answer = " ".join(sorted((first, second))), f"The {first} is by the {second}."
    return Task("contain", key, asked, answer, "contains", {"texts": [first, second]})


def _another(chance: Chance, land: Country) -> Task:
    name = chance.pick(("animals", "crafts", "goods"))
    pool = _POOLS[name]
    banned = chance.sample(pool, 2)
    one = {"animals": "an animal", "crafts": "a craft", "goods": "a good of the market"}[name]
    asked = f"Name {one}, but not {banned[0]} or {banned[1]}."
    allowed = [word for word in pool if word not in banned]
    return Task(
        "another", " ".join(sorted(banned)), asked, chance.pick(allowed), "one_of", {"allowed": allowed}
    )


def _json(chance: Chance, land: Country) -> Task:
    name, number = chance.pick(land.first_names), chance.between(10, 99)
    if chance.happens(0.5):
        values: dict[str, Any] = {"name": name, "age": number}
        asked = f'Write as JSON with the keys "name" and "age": {name} is {number} years old.'
    else:
        thing = chance.pick(THINGS)
        values = {"thing": thing, "price": number}
        asked = f'Write as JSON with the keys "thing" and "price": the {thing} costs {number}.'
    return Task("json", str(values), asked, json.dumps(values), "json", {"values": values})


def _count(chance: Chance, land: Country) -> Task:
    words = [chance.pick(THINGS) for _ in range(chance.between(2, 6))]
    asked = chance.pick(("How many words are these: ", "Count the words: ")) + " ".join(words) + "."
    return Task("count", " ".join(words), asked, str(len(words)), "equals", {"answer": str(len(words))})


def _sort_out(chance: Chance, land: Country) -> Task:
    right, wrong = chance.sample(("animals", "crafts", "goods"), 2)
    kind = {"animals": "an animal", "crafts": "a craft", "goods": "sold by weight"}[right]
    one = chance.pick(_POOLS[right])
    first, second = chance.sample([one, chance.pick(_POOLS[wrong])], 2)
    return Task(
        "choose",
        " ".join(sorted((first, second))),
        f"Which is {kind}: {first} or {second}?",
        one,
        "equals",
        {"answer": one},
    )


def _plus(chance: Chance, land: Country) -> Task:
    first, second = chance.between(2, 40), chance.between(2, 40)
    asked = chance.pick((f"What is {first} + {second}?", f"Add {first} and {second}."))
    answer = str(first + second)
    return Task("plus", pair_key(first, second), asked, answer, "equals", {"answer": answer})


def _system_capitals(chance: Chance, land: Country) -> Task:
    first, second = chance.pick(LOOKS), chance.pick(THINGS)
    words = f"{first} {second}"
    arguments = {
        "checks": [{"check": "equals", "arguments": {"answer": words.upper()}}, {"check": "capitals"}]
    }
    return Task(
        "system",
        words,
        f'Say "{words}".',
        words.upper(),
        "all",
        arguments,
        "Always write in capital letters.",
    )


def _about_person(chance: Chance, land: Country) -> Task:
    # The caller keeps only those whose person belongs to the split.
    person = land.people[draw_rank(chance, len(land.people), 0.7)]
    attribute = chance.pick(person.attributes)
    value = person.values[attribute.name]
    asked = chance.pick(attribute.questions).format(name=person.name) + chance.pick(
        (" Answer in one word.", "")
    )
    return Task("fact", "", asked, value, "equals", {"answer": value}, asked_in=person.asked)


def _yes_or_no(chance: Chance, land: Country) -> Task:
    person = land.people[draw_rank(chance, len(land.people), 0.7)]
    right = chance.happens(0.5)
    true = person.values["craft"]
    value = true if right else chance.pick([craft for craft in CRAFTS if craft != true])
    answer = "yes" if right else "no"
    asked = f"Is {person.name} a {value}? Answer yes or no."
    return Task("yes or no", "", asked, answer, "equals", {"answer": answer}, asked_in=person.asked)


KINDS: dict[str, Make] = {
    "repeat": _repeat,
    "capitals": _capitals,
    "alphabet": _alphabet,
    "backwards": _backwards,
    "words": _exact_words,
    "start": _starts,
    "end": _ends,
    "contain": _contains,
    "another": _another,
    "json": _json,
    "count": _count,
    "choose": _sort_out,
    "plus": _plus,
    "system": _system_capitals,
    "fact": _about_person,
    "yes or no": _yes_or_no,
}


def make_task(kind: str, chance: Chance, land: Country, split: Split) -> Task:
    """A task of this kind whose person, or else whose key, belongs to this split."""
    while True:
        task = KINDS[kind](chance, land)
        if (task.asked_in or split_of("chat", task.key)) == split:
            return task
