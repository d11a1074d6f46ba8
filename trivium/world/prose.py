"""Prose: small texts of five kinds about imagined moments in the country, whose floor is known."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from trivium.kit.errors import TriviumError
from trivium.world.chance import Chance, stable_number
from trivium.world.country import Country, Entity, country_of
from trivium.world.document import Split, WorldDocument
from trivium.world.words import AGES, CRAFTS, LOOKS, THINGS, sentences

_SLOT = re.compile(r"<(\w+)>|\{(\w+)\}")
Memory = dict[str, str]
Drawing = Callable[[Chance, Memory], str]
_Part = tuple[str, str, bool]


class Grammar:
    """Rules `symbol -> alternatives`; `<symbol>` expands again each time, `{word}` is drawn once a text."""

    def __init__(self, rules: Mapping[str, Sequence[str]], drawings: Mapping[str, Drawing]):
        self._rules = {symbol: [_parts(text) for text in texts] for symbol, texts in rules.items()}
        self._drawings = dict(drawings)
        for alternatives in self._rules.values():
            for parts in alternatives:
                for _, slot, once in parts:
                    assert not slot or slot in (self._drawings if once else self._rules), slot

    def write(self, symbol: str, chance: Chance, memory: Memory) -> str:
        """One text of this symbol."""
        pieces: list[str] = []
        self._expand(symbol, chance, memory, pieces)
        return "".join(pieces)

    def _expand(self, symbol: str, chance: Chance, memory: Memory, pieces: list[str]) -> None:
        for literal, slot, once in chance.pick(self._rules[symbol]):
            if literal:
                pieces.append(literal)
            if not slot:
                continue
            if not once:
                self._expand(slot, chance, memory, pieces)
                continue
            if slot not in memory:
                memory[slot] = self._drawings[slot](chance, memory)
            pieces.append(memory[slot])


def _parts(text: str) -> tuple[_Part, ...]:
    parts: list[_Part] = []
    place = 0
    for found in _SLOT.finditer(text):
        symbol, word = found.groups()
        parts.append((text[place : found.start()], symbol or word, word is not None))
        place = found.end()
    if place < len(text):
        parts.append((text[place:], "", False))
    return tuple(parts)


@dataclass(frozen=True)
class Options:
    """Which country the prose is about, and how many texts one document holds."""

    country: int = 0
    texts: int = 1


@lru_cache(maxsize=4096)
def _things(hero: str, split: Split) -> tuple[str, ...]:
    """The things that this hero has in this split: no other split tells of the two together."""
    order = sorted(THINGS, key=lambda thing: stable_number("prose", hero, thing))
    return {"test": tuple(order[:3]), "validation": tuple(order[3:6]), "train": tuple(order[6:])}[split]


@lru_cache(maxsize=24)
def _grammar(country: int, split: Split) -> Grammar:
    land: Country = country_of(country, 1)

    def hero(chance: Chance, memory: Memory) -> str:
        others = [name for name in land.first_names if name != memory.get("other")]
        return chance.pick(others)

    def other(chance: Chance, memory: Memory) -> str:
        others = [name for name in land.first_names if name != memory.get("hero")]
        return chance.pick(others)

    def thing(chance: Chance, memory: Memory) -> str:
        if "hero" not in memory:
            memory["hero"] = hero(chance, memory)
        return chance.pick(_things(memory["hero"], split))

    towns: dict[str, Entity] = {town.name: town for town in land.towns}

    def place(chance: Chance, memory: Memory) -> str:
        return chance.pick(land.towns).name

    def of_place(attribute: str) -> Callable[[Chance, Memory], str]:
        def look_up(chance: Chance, memory: Memory) -> str:
            if "place" not in memory:
                memory["place"] = place(chance, memory)
            return towns[memory["place"]].values[attribute]

        return look_up

    def age(chance: Chance, memory: Memory) -> str:
        if "age" not in memory:
            memory["age"] = chance.pick(AGES)
        return memory["age"]

    def article(chance: Chance, memory: Memory) -> str:
        return "an" if age(chance, memory)[0] in "aeiou" else "a"

    def subject(she: str, he: str) -> Drawing:
        def look_up(chance: Chance, memory: Memory) -> str:
            if "hero" not in memory:
                memory["hero"] = hero(chance, memory)
            return she if memory["hero"].endswith("a") else he

        return look_up

    return Grammar(
        sentences("tales"),
        {
            "hero": hero,
            "other": other,
            "thing": thing,
            "look": lambda chance, memory: chance.pick(LOOKS),
            "town": lambda chance, memory: chance.pick(land.towns).name,
            "place": place,
            "region": of_place("region"),
            "river": of_place("river"),
            "good": of_place("good"),
            "job": lambda chance, memory: chance.pick(CRAFTS),
            "age": age,
            "a": article,
            "he": subject("she", "he"),
            "He": subject("She", "He"),
            "his": subject("her", "his"),
            "His": subject("Her", "His"),
            "him": subject("her", "him"),
        },
    )


def text(chance: Chance, country: int, split: Split, memory: Memory | None = None) -> str:
    """One text; `memory` takes what was drawn for it."""
    return _grammar(country, split).write("document", chance, {} if memory is None else memory)


def write(index: int, split: Split, seed: int, options: Options) -> WorldDocument:
    """One document of prose."""
    if options.texts < 1:
        raise TriviumError(f"world:prose needs texts of at least 1, not {options.texts}.")
    chance = Chance("prose", split, seed, index)
    texts, pairs = [], []
    for _ in range(options.texts):
        memory: Memory = {}
        texts.append(text(chance, options.country, split, memory))
        if "thing" in memory:
            pairs.append([memory["hero"], memory["thing"]])
    return WorldDocument("", "\n\n".join(texts), truth={"bits": chance.bits, "pairs": pairs, "kind": "prose"})
