"""What every source that tells of named things shares: who is told of, in which words, and what is asked."""

import math
from functools import lru_cache

from trivium.world.chance import Chance, stable_number
from trivium.world.country import Attribute, Entity, draw_rank, frequencies
from trivium.world.document import Split


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
