"""The country: its people and towns, and everything that is true about them."""

import bisect
import itertools
from dataclasses import dataclass
from functools import lru_cache

from trivium.kit.errors import TriviumError
from trivium.world.chance import Chance, stable_number
from trivium.world.document import Split
from trivium.world.names import names
from trivium.world.words import ANIMALS, CRAFTS, GOODS, REGIONS, sentences

FIRST_YEAR, YEARS = 200, 100
FEWEST_PEOPLE, MOST_PEOPLE = 20, 2000
STEEPEST = 3


@dataclass(frozen=True)
class Attribute:
    """Something true of every person or town: how it is stated (the answer last) and how it is asked."""

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


def attributes(kind: str) -> tuple[Attribute, ...]:
    """The attributes of a kind of thing: person, town or product."""
    return tuple(
        Attribute(name, tuple(one["statements"]), tuple(one["questions"]))
        for name, one in sentences("attributes")[kind].items()
    )


PERSON_ATTRIBUTES = attributes("person")
TOWN_ATTRIBUTES = attributes("town")


@dataclass(frozen=True)
class Entity:
    """One person or town; `rank` 0 is spoken of most; `asked` is the split of the questions on it."""

    name: str
    kind: str
    rank: int
    asked: Split
    values: dict[str, str]
    attributes: tuple[Attribute, ...]


def asked_split(country: int, kind: str, rank: int) -> Split:
    """The split in which the one of this rank is asked about."""
    # Blocks of ten neighbouring ranks hold five of train, one of validation and four of test,
    # so every frequency has questions that training never saw.
    order = sorted(range(10), key=lambda place: stable_number("asked", country, kind, rank // 10, place))
    place = order.index(rank % 10)
    if place < 5:
        return "train"
    return "validation" if place == 5 else "test"


@dataclass(frozen=True)
class Country:
    """Everybody and everywhere."""

    people: tuple[Entity, ...]
    towns: tuple[Entity, ...]
    houses: tuple[str, ...]
    rivers: tuple[str, ...]
    years: tuple[str, ...]
    first_names: tuple[str, ...]
    families: tuple[str, ...]

    def pool(self, attribute: str) -> tuple[str, ...]:
        """Every value that an attribute can have."""
        town_names = tuple(town.name for town in self.towns)
        pools: dict[str, tuple[str, ...]] = {
            "birthplace": town_names,
            "home": town_names,
            "year": self.years,
            "craft": CRAFTS,
            "house": self.houses,
            "animal": ANIMALS,
            "river": self.rivers,
            "good": GOODS,
            "region": REGIONS,
        }
        return pools[attribute]


@lru_cache(maxsize=8)
def country_of(country: int, people: int, towns: int = 24) -> Country:
    """The country of this number, with this many people; a smaller one is the beginning of a larger one."""
    if not 1 <= people <= MOST_PEOPLE:
        raise TriviumError(f"The country has from 1 to {MOST_PEOPLE} people, not {people}; change `people`.")
    taken: set[str] = set()
    town_names = names("town", towns, country, taken)
    houses = tuple(names("house", 16, country, taken))
    rivers = tuple(names("river", 8, country, taken))
    women, men = names("woman", 32, country, taken), names("man", 32, country, taken)
    families = names("family", 48, country, taken)
    years = tuple(str(FIRST_YEAR + year) for year in range(YEARS))
    places = tuple(
        Entity(
            name,
            "town",
            rank,
            asked_split(country, "town", rank),
            {
                "river": Chance("river", country, rank).pick(rivers),
                "good": Chance("good", country, rank).pick(GOODS),
                "region": Chance("region", country, rank).pick(REGIONS),
            },
            TOWN_ATTRIBUTES,
        )
        for rank, name in enumerate(town_names)
    )
    empty = Country((), places, houses, rivers, years, tuple(women + men), tuple(families))
    used: set[str] = set()
    persons = []
    for rank in range(people):
        chance = Chance("person", country, rank)
        name = ""
        while not name or name in used:
            name = f"{chance.pick(empty.first_names)} {chance.pick(families)}"
        used.add(name)
        values = {attribute.name: chance.pick(empty.pool(attribute.name)) for attribute in PERSON_ATTRIBUTES}
        persons.append(
            Entity(name, "person", rank, asked_split(country, "person", rank), values, PERSON_ATTRIBUTES)
        )
    return Country(tuple(persons), places, houses, rivers, years, empty.first_names, empty.families)


def peopled(country: int, people: int) -> Country:
    """The country with enough people for every split to ask about some."""
    if people < FEWEST_PEOPLE:
        raise TriviumError(f"This source needs people >= {FEWEST_PEOPLE}, not {people}.")
    return country_of(country, people)


@lru_cache(maxsize=32)
def frequencies(count: int, zipf: float) -> tuple[float, ...]:
    """How often each rank is spoken of: shares that fall as 1 / (rank + 1) ** zipf and sum to one."""
    if not 0 <= zipf <= STEEPEST:
        raise TriviumError(f"The option 'zipf' lies between 0 (all alike) and {STEEPEST}, not {zipf:g}.")
    weights = [(rank + 1) ** -zipf for rank in range(count)]
    total = sum(weights)
    return tuple(weight / total for weight in weights)


@lru_cache(maxsize=32)
def _cumulative(count: int, zipf: float) -> tuple[float, ...]:
    return tuple(itertools.accumulate(frequencies(count, zipf)))


def draw_rank(chance: Chance, count: int, zipf: float) -> int:
    """A rank drawn by frequency; the caller counts its bits."""
    return min(bisect.bisect_right(_cumulative(count, zipf), chance.random()), count - 1)
