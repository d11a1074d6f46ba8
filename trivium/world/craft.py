"""A domain of its own: what the crafts make, of what, with which tool and for how long."""

from dataclasses import dataclass
from functools import lru_cache

from trivium.kit.errors import TriviumError
from trivium.world.chance import Chance
from trivium.world.country import Attribute, Entity, asked_split, frequencies
from trivium.world.document import Question, Share, Split, WorldDocument, in_form
from trivium.world.entities import askable, draw_entity, four_choices, phrasings
from trivium.world.names import names
from trivium.world.words import CRAFTS, GOODS

PRODUCT_ATTRIBUTES = (
    Attribute(
        "maker",
        (
            "A {name} is made by a {value}.",
            "To make a {name} you must be a {value}.",
            "The {name} is the work of a {value}.",
            "If you need a {name}, ask a {value}.",
            "Only one craft knows the {name}, that of the {value}.",
            "Whoever sells a {name} is a {value}.",
        ),
        ("Who makes a {name}?", "Which craft makes the {name}?"),
    ),
    Attribute(
        "material",
        (
            "A {name} consists of {value}.",
            "The main part of a {name} is {value}.",
            "For a {name} you need much {value}.",
            "Every {name} begins with a pound of {value}.",
            "A good {name} is pure {value}.",
            "The material of the {name} is {value}.",
        ),
        ("What does a {name} consist of?", "What is the material of a {name}?"),
    ),
    Attribute(
        "tool",
        (
            "The {name} is shaped with the {value}.",
            "The tool for a {name} is the {value}.",
            "Nobody makes a {name} without a {value}.",
            "For the {name} the master takes the {value}.",
            "The last touch of a {name} is given with a {value}.",
            "Beside every unfinished {name} lies a {value}.",
        ),
        ("Which tool does a {name} need?", "With what is the {name} shaped?"),
    ),
    Attribute(
        "days",
        (
            "In days, the time for a {name} is {value}.",
            "The days that a {name} takes are {value}.",
            "Count the days of work in a {name}: they are {value}.",
            "The number of days for a {name} is {value}.",
            "How long a {name} must rest, in days, is {value}.",
            "The days until a {name} is ready number {value}.",
        ),
        ("How many days does a {name} take?", "What is the number of days for a {name}?"),
    ),
)
MOST_PRODUCTS = 5000
_DAYS = tuple(str(day) for day in range(11, 43))


@dataclass(frozen=True)
class Dials:
    """How many products there are, how unevenly they are told of, the share of questions; form=chat asks."""

    country: int = 0
    products: int = 80
    zipf: float = 0.5
    questions_share: Share = 0.1
    sentences_low: int = 4
    sentences_high: int = 8
    form: str = "document"


@dataclass(frozen=True)
class Workshop:
    """Every product, and the values that its attributes can have."""

    products: tuple[Entity, ...]
    pools: dict[str, tuple[str, ...]]


@lru_cache(maxsize=8)
def workshop(country: int, products: int) -> Workshop:
    """The products of this country."""
    if not 20 <= products <= MOST_PRODUCTS:
        raise TriviumError(f"world:craft needs from 20 to {MOST_PRODUCTS} products, not {products}.")
    taken: set[str] = set()
    tools = tuple(name.lower() for name in names("tool", 16, country, taken))
    pools = {"maker": CRAFTS, "material": GOODS, "tool": tools, "days": _DAYS}
    made = []
    for rank, name in enumerate(names("product", products, country, taken)):
        chance = Chance("product", country, rank)
        values = {attribute.name: chance.pick(pools[attribute.name]) for attribute in PRODUCT_ATTRIBUTES}
        asked = asked_split(country, "product", rank)
        made.append(Entity(name.lower(), "product", rank, asked, values, PRODUCT_ATTRIBUTES))
    return Workshop(tuple(made), pools)


def write(index: int, split: Split, seed: int, dials: Dials) -> WorldDocument:
    """One document of sentences about different products."""
    if (chat := in_form(dials.form, "craft", lambda: ask(index, split, seed, dials))) is not None:
        return chat
    if not 1 <= dials.sentences_low <= dials.sentences_high <= 20:
        raise TriviumError("world:craft needs 1 <= sentences_low <= sentences_high <= 20.")
    products = workshop(dials.country, dials.products).products
    chance = Chance("craft", split, seed, index)
    sentences, told = [], []
    drawn: dict[str, float] = {}
    for _ in range(chance.between(dials.sentences_low, dials.sentences_high)):
        product = draw_entity(chance, products, dials.zipf, drawn)
        attribute = chance.pick(product.attributes)
        value = product.values[attribute.name]
        if product.asked == split and chance.happens(dials.questions_share):
            asked = chance.pick(attribute.questions).format(name=product.name)
            sentences.append(f"Question: {asked} Answer: {value}.")
        else:
            phrase = chance.pick(phrasings(dials.country, product.name, attribute, split))
            sentences.append(phrase.format(name=product.name, value=value))
        told.append(
            {"entity": product.name, "attribute": attribute.name, "value": value, "rank": product.rank}
        )
    truth = {"facts": told, "bits": chance.bits, "kind": "craft"}
    return WorldDocument("", " ".join(sentences), truth=truth)


def ask(index: int, split: Split, seed: int, dials: Dials) -> Question:
    """Question number `index`: every fact of this split's products once."""
    shop = workshop(dials.country, dials.products)
    items = _askable(dials.country, dials.products, split)
    product, attribute = items[index % len(items)]
    value = product.values[attribute.name]
    chance = Chance("ask craft", split, seed, index)
    statement = chance.pick(phrasings(dials.country, product.name, attribute, split))
    return Question(
        id="",
        prompt=statement.split(" {value}")[0].format(name=product.name),
        question=chance.pick(attribute.questions).format(name=product.name),
        answer=value,
        choices=four_choices(chance, shop.pools[attribute.name], value),
        check={"check": "equals", "arguments": {"answer": value}},
        truth={
            "entity": product.name,
            "kind": "product",
            "attribute": attribute.name,
            "rank": product.rank,
            "frequency": frequencies(dials.products, dials.zipf)[product.rank],
            "chance_level": 1 / len(shop.pools[attribute.name]),
        },
    )


@lru_cache(maxsize=32)
def _askable(country: int, products: int, split: Split) -> tuple[tuple[Entity, Attribute], ...]:
    return askable(country, workshop(country, products).products, split)


def count(split: Split, dials: Dials) -> int:
    """How many different questions there are."""
    return len(_askable(dials.country, dials.products, split))
