"""What is true of people and towns, one sentence at a time and never two on the same one in a document."""

import math
from dataclasses import dataclass
from functools import lru_cache

from trivium.world.chance import Chance, stable_number
from trivium.world.country import Attribute, Country, Entity, country_of, draw_rank, frequencies
from trivium.world.document import Question, Split, WorldDocument


@dataclass(frozen=True)
class Dials:
    """How many people there are, how unevenly they are spoken of, and how much of the text is questions."""

    country: int = 0
    people: int = 240
    zipf: float = 0.7
    towns_share: float = 0.15
    questions_share: float = 0.1
    sentences_low: int = 4
    sentences_high: int = 8


@lru_cache(maxsize=65536)
def phrasings(country: int, name: str, attribute: Attribute, split: Split) -> tuple[str, ...]:
    """The ways to state this fact in this split: one is kept for the test and one for validation."""
    order = sorted(attribute.statements, key=lambda text: stable_number("phrasing", country, name, text))
    return {"test": tuple(order[:1]), "validation": tuple(order[1:2]), "train": tuple(order[2:])}[split]


def _entity(chance: Chance, land: Country, dials: Dials, drawn: dict[str, float]) -> Entity:
    towns = chance.happens(dials.towns_share)
    group, kind = (land.towns, "town") if towns else (land.people, "person")
    shares = frequencies(len(group), dials.zipf)
    while True:
        entity = group[draw_rank(chance, len(group), dials.zipf)]
        if entity.name not in drawn:
            break
    left = 1.0 - sum(share for name, share in drawn.items() if (" " in name) == (kind == "person"))
    chance.bits -= math.log2(shares[entity.rank] / left)
    drawn[entity.name] = shares[entity.rank]
    return entity


def write(index: int, split: Split, seed: int, dials: Dials) -> WorldDocument:
    """One document of sentences about different people and towns."""
    land = country_of(dials.country, dials.people)
    chance = Chance("facts", split, seed, index)
    sentences, told = [], []
    drawn: dict[str, float] = {}
    for _ in range(chance.between(dials.sentences_low, dials.sentences_high)):
        entity = _entity(chance, land, dials, drawn)
        attribute = chance.pick(entity.attributes)
        value = entity.values[attribute.name]
        if entity.asked == split and chance.happens(dials.questions_share):
            asked = chance.pick(attribute.questions).format(name=entity.name)
            sentences.append(f"Question: {asked} Answer: {value}.")
        else:
            phrase = chance.pick(phrasings(dials.country, entity.name, attribute, split))
            sentences.append(phrase.format(name=entity.name, value=value))
        told.append({"entity": entity.name, "attribute": attribute.name, "value": value, "rank": entity.rank})
    return WorldDocument(
        id="", text=" ".join(sentences), truth={"facts": told, "bits": chance.bits, "kind": "facts"}
    )


def _choices(chance: Chance, land: Country, attribute: str, value: str) -> tuple[str, ...]:
    others = [other for other in land.pool(attribute) if other != value]
    return tuple(chance.shuffled([value, *chance.sample(others, 3)]))


def ask(index: int, split: Split, seed: int, dials: Dials) -> Question:
    """Question number `index`: every fact of this split's entities once, in an order that favours none."""
    land = country_of(dials.country, dials.people)
    items = askable(dials.country, dials.people, split)
    entity, attribute = items[index % len(items)]
    value = entity.values[attribute.name]
    chance = Chance("ask facts", split, seed, index)
    phrase = phrasings(dials.country, entity.name, attribute, split)
    statement = phrase[index % len(phrase)]
    group = land.people if entity.kind == "person" else land.towns
    return Question(
        id="",
        prompt=statement.split(" {value}")[0].format(name=entity.name),
        question=chance.pick(attribute.questions).format(name=entity.name),
        answer=value,
        choices=_choices(chance, land, attribute.name, value),
        check={"check": "equals", "arguments": {"answer": value}},
        truth={
            "entity": entity.name,
            "kind": entity.kind,
            "attribute": attribute.name,
            "rank": entity.rank,
            "frequency": frequencies(len(group), dials.zipf)[entity.rank],
            "chance_level": 1 / len(land.pool(attribute.name)),
        },
    )


@lru_cache(maxsize=32)
def askable(country: int, people: int, split: Split) -> tuple[tuple[Entity, Attribute], ...]:
    """Every fact that this split's questions may ask for."""
    land = country_of(country, people)
    facts = [
        (entity, attribute)
        for entity in (*land.people, *land.towns)
        if entity.asked == split
        for attribute in entity.attributes
    ]
    return tuple(
        sorted(facts, key=lambda fact: stable_number("askable", country, fact[0].name, fact[1].name))
    )


def count(split: Split, dials: Dials) -> int:
    """How many different questions there are."""
    return len(askable(dials.country, dials.people, split))
