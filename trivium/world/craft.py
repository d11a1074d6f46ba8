"""A domain of its own: what the crafts make, of what, with which tool and for how long."""

from dataclasses import dataclass
from functools import lru_cache

from trivium.kit.errors import TriviumError
from trivium.world.chance import Chance
from trivium.world.country import Attribute, Entity, asked_split, attributes, frequencies
from trivium.world.document import Question, Share, Split, WorldDocument, in_form
from trivium.world.entities import askable, draw_entity, fact_question, sentence_about
from trivium.world.names import names
from trivium.world.words import CRAFTS, GOODS

PRODUCT_ATTRIBUTES = attributes("product")
MOST_PRODUCTS = 5000
_DAYS = tuple(str(day) for day in range(11, 43))


@dataclass(frozen=True)
class Options:
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


def write(index: int, split: Split, seed: int, options: Options) -> WorldDocument:
    """One document of sentences about different products."""
    if (chat := in_form(options.form, "craft", lambda: ask(index, split, seed, options))) is not None:
        return chat
    if not 1 <= options.sentences_low <= options.sentences_high <= 20:
        raise TriviumError("world:craft needs 1 <= sentences_low <= sentences_high <= 20.")
    products = workshop(options.country, options.products).products
    chance = Chance("craft", split, seed, index)
    sentences, stated = [], []
    drawn: dict[str, float] = {}
    for _ in range(chance.between(options.sentences_low, options.sentences_high)):
        product = draw_entity(chance, products, options.zipf, drawn)
        sentence, fact = sentence_about(chance, product, options.country, split, options.questions_share)
        sentences.append(sentence)
        stated.append(fact)
    truth = {"facts": stated, "bits": chance.bits, "kind": "craft"}
    return WorldDocument("", " ".join(sentences), truth=truth)


def ask(index: int, split: Split, seed: int, options: Options) -> Question:
    """Question number `index`: every fact of this split's products once."""
    shop = workshop(options.country, options.products)
    items = _askable(options.country, options.products, split)
    fact = items[index % len(items)]
    return fact_question(
        Chance("ask craft", split, seed, index), fact, options.country, split,
        shop.pools[fact[1].name], frequencies(options.products, options.zipf)[fact[0].rank],
    )  # fmt: skip


@lru_cache(maxsize=32)
def _askable(country: int, products: int, split: Split) -> tuple[tuple[Entity, Attribute], ...]:
    return askable(country, workshop(country, products).products, split)


def count(split: Split, options: Options) -> int:
    """How many different questions there are."""
    return len(_askable(options.country, options.products, split))
