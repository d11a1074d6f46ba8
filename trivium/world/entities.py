"""What every source that tells of named things shares: who is told of, in which words, and what is asked."""

import math
from functools import lru_cache
from typing import Any

from trivium.world.chance import Chance, stable_number
from trivium.world.country import Attribute, Entity, draw_rank, frequencies
from trivium.world.document import Question, Split


@lru_cache(maxsize=65536)
def phrasings(country: int, name: str, attribute: Attribute, split: Split) -> tuple[str, ...]:
    """The ways to state this fact in this split: one is kept for the test and one for validation."""
    order = sorted(attribute.statements, key=lambda text: stable_number("phrasing", country, name, text))
    return {"test": tuple(order[:1]), "validation": tuple(order[1:2]), "train": tuple(order[2:])}[split]


def draw_entity(chance: Chance, group: tuple[Entity, ...], zipf: float, drawn: dict[str, float]) -> Entity:
    """One of the group by frequency that was not drawn before; `drawn` remembers it with its share."""
    shares = frequencies(len(group), zipf)
    left = 1.0 - sum(drawn.values())
    while True:
        entity = group[draw_rank(chance, len(group), zipf)]
        if entity.name not in drawn:
            chance.bits -= math.log2(shares[entity.rank] / left)
            drawn[entity.name] = shares[entity.rank]
            return entity


def four_choices(chance: Chance, pool: tuple[str, ...], value: str) -> tuple[str, ...]:
    """The right value among three others of its kind."""
    others = [other for other in pool if other != value]
    return tuple(chance.shuffled([value, *chance.sample(others, 3)]))


def askable(country: int, entities: tuple[Entity, ...], split: Split) -> tuple[tuple[Entity, Attribute], ...]:
    """Every fact that this split's questions may ask for, once, in an order that favours none."""
    facts = [
        (entity, attribute) for entity in entities if entity.asked == split for attribute in entity.attributes
    ]
    facts.sort(key=lambda fact: stable_number("askable", country, fact[0].name, fact[1].name))
    return tuple(facts)


def sentence_about(
    chance: Chance, entity: Entity, country: int, split: Split, questions_share: float
) -> tuple[str, dict[str, Any]]:
    """A sentence that states a fact of an entity, or asks for it and answers; and which fact it is."""
    attribute = chance.pick(entity.attributes)
    value = entity.values[attribute.name]
    if entity.asked == split and chance.happens(questions_share):
        sentence = f"Question: {chance.pick(attribute.questions).format(name=entity.name)} Answer: {value}."
    else:
        phrase = chance.pick(phrasings(country, entity.name, attribute, split))
        sentence = phrase.format(name=entity.name, value=value)
    fact = {"entity": entity.name, "attribute": attribute.name, "value": value, "rank": entity.rank}
    return sentence, fact


def fact_question(
    chance: Chance, fact: tuple[Entity, Attribute], country: int, split: Split, pool: tuple[str, ...],
    frequency: float,
) -> Question:  # fmt: skip
    """The question for a fact, whose right answer is one of the pool; how often the entity is told of."""
    entity, attribute = fact
    value = entity.values[attribute.name]
    statement = chance.pick(phrasings(country, entity.name, attribute, split))
    return Question(
        id="",
        prompt=statement.split(" {value}")[0].format(name=entity.name),
        question=chance.pick(attribute.questions).format(name=entity.name),
        answer=value,
        choices=four_choices(chance, pool, value),
        check={"check": "equals", "arguments": {"answer": value}},
        truth={
            "entity": entity.name, "kind": entity.kind, "attribute": attribute.name, "rank": entity.rank,
            "frequency": frequency, "chance_level": 1 / len(pool),
        },
    )  # fmt: skip
