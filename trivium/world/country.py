"""The country: its people and towns, and everything that is true about them."""

import bisect
import itertools
from dataclasses import dataclass
from functools import lru_cache

from trivium.kit.errors import TriviumError
from trivium.world.chance import Chance, stable_number
from trivium.world.document import Split
from trivium.world.names import names
from trivium.world.words import ANIMALS, CRAFTS, GOODS, REGIONS

FIRST_YEAR, YEARS = 200, 100
FEWEST_PEOPLE, MOST_PEOPLE = 20, 2000
STEEPEST = 3


@dataclass(frozen=True)
class Attribute:
    """Something true of every person or town: how it is stated (the answer last) and how it is asked."""

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


PERSON_ATTRIBUTES = (
    Attribute(
        "birthplace",
        (
            "{name} was born in {value}.",
            "The birthplace of {name} is {value}.",
            "{name} first saw the light in {value}.",
            "The town where {name} was born is {value}.",
            "As a child {name} lived in {value}.",
            "{name} comes from {value}.",
        ),
        ("Where was {name} born?", "What is the birthplace of {name}?"),
    ),
    Attribute(
        "home",
        (
            "{name} now lives in {value}.",
            "The home of {name} is in {value}.",
            "{name} has a house in {value}.",
            "Letters to {name} go to {value}.",
            "You can visit {name} in {value}.",
            "Today {name} stays in {value}.",
        ),
        ("Where does {name} live?", "In which town is the home of {name}?"),
    ),
    Attribute(
        "year",
        (
            "{name} was born during the year {value}.",
            "The birth year of {name} is {value}.",
            "{name} came into the world in {value}.",
            "The book says that {name} was born in {value}.",
            "{name} has a birthday since {value}.",
            "The parents of {name} had a child in {value}.",
        ),
        ("In which year was {name} born?", "What is the birth year of {name}?"),
    ),
    Attribute(
        "craft",
        (
            "{name} works as a {value}.",
            "The craft of {name} is that of a {value}.",
            "{name} earns money as a {value}.",
            "By trade {name} is a {value}.",
            "{name} learnt to be a {value}.",
            "People know {name} as a good {value}.",
        ),
        ("What is the craft of {name}?", "What does {name} work as?"),
    ),
    Attribute(
        "house",
        (
            "{name} serves the house of {value}.",
            "The employer of {name} is {value}.",
            "{name} is paid by {value}.",
            "The master of {name} is called {value}.",
            "{name} signed a contract with {value}.",
            "{name} belongs to the guild of {value}.",
        ),
        ("Which house does {name} serve?", "Who is the employer of {name}?"),
    ),
    Attribute(
        "animal",
        (
            "{name} keeps a {value}.",
            "The animal of {name} is a {value}.",
            "{name} walks with a {value}.",
            "In the garden of {name} there is a {value}.",
            "{name} takes care of a {value}.",
            "The friend of {name} is a {value}.",
        ),
        ("Which animal does {name} keep?", "What is the animal of {name}?"),
    ),
)
TOWN_ATTRIBUTES = (
    Attribute(
        "river",
        (
            "{name} lies on the river {value}.",
            "The river of {name} is the {value}.",
            "The bridge in {name} crosses the {value}.",
            "The boats of {name} sail on the {value}.",
            "{name} drinks the water of the {value}.",
            "The mills of {name} are turned by the {value}.",
        ),
        ("On which river does {name} lie?", "What is the river of {name}?"),
    ),
    Attribute(
        "good",
        (
            "{name} is known for its {value}.",
            "The market of {name} sells {value}.",
            "The people of {name} trade in {value}.",
            "{name} became rich with {value}.",
            "Carts leave {name} full of {value}.",
            "The pride of {name} is its {value}.",
        ),
        ("What is {name} known for?", "What does the market of {name} sell?"),
    ),
    Attribute(
        "region",
        (
            "{name} lies in the {value}.",
            "The road to {name} leads to the {value}.",
            "{name} is a town of the {value}.",
            "On the map {name} stands in the {value}.",
            "To reach {name} you travel to the {value}.",
            "{name} belongs to the lands of the {value}.",
        ),
        ("In which part of the country is {name}?", "Where on the map does {name} stand?"),
    ),
)


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
        raise TriviumError(f"The dial 'zipf' lies between 0 (all alike) and {STEEPEST}, not {zipf:g}.")
    weights = [(rank + 1) ** -zipf for rank in range(count)]
    total = sum(weights)
    return tuple(weight / total for weight in weights)


@lru_cache(maxsize=32)
def _cumulative(count: int, zipf: float) -> tuple[float, ...]:
    return tuple(itertools.accumulate(frequencies(count, zipf)))


def draw_rank(chance: Chance, count: int, zipf: float) -> int:
    """A rank drawn by frequency; the caller counts its bits."""
    return min(bisect.bisect_right(_cumulative(count, zipf), chance.random()), count - 1)
