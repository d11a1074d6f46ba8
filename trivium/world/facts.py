"""What is true of people and towns, one sentence at a time and never two on the same one in a document."""

from dataclasses import dataclass
from functools import lru_cache

from trivium.kit.errors import TriviumError
from trivium.world.chance import Chance
from trivium.world.country import Attribute, Entity, frequencies, peopled
from trivium.world.document import Question, Share, Split, WorldDocument, in_form
from trivium.world.entities import askable, draw_entity, four_choices, phrasings


@dataclass(frozen=True)
class Options:
    """How many people there are, how unevenly they are told of, the share of questions; form=chat asks."""

    country: int = 0
    people: int = 240
    zipf: float = 0.7
    towns_share: Share = 0.15
    questions_share: Share = 0.1
    sentences_low: int = 4
    sentences_high: int = 8
    form: str = "document"


def write(index: int, split: Split, seed: int, options: Options) -> WorldDocument:
    """One document of sentences about different people and towns."""
    if (chat := in_form(options.form, "facts", lambda: ask(index, split, seed, options))) is not None:
        return chat
    land = peopled(options.country, options.people)
    if not 1 <= options.sentences_low <= options.sentences_high <= min(options.people, len(land.towns)):
        raise TriviumError(
            "world:facts tells of each person and town once a document: it needs "
            f"1 <= sentences_low <= sentences_high <= people, and at most {len(land.towns)}."
        )
    chance = Chance("facts", split, seed, index)
    sentences, told = [], []
    people: dict[str, float] = {}
    towns: dict[str, float] = {}
    for _ in range(chance.between(options.sentences_low, options.sentences_high)):
        town = chance.happens(options.towns_share)
        group, drawn = (land.towns, towns) if town else (land.people, people)
        entity = draw_entity(chance, group, options.zipf, drawn)
        attribute = chance.pick(entity.attributes)
        value = entity.values[attribute.name]
        if entity.asked == split and chance.happens(options.questions_share):
            asked = chance.pick(attribute.questions).format(name=entity.name)
            sentences.append(f"Question: {asked} Answer: {value}.")
        else:
            phrase = chance.pick(phrasings(options.country, entity.name, attribute, split))
            sentences.append(phrase.format(name=entity.name, value=value))
        told.append({"entity": entity.name, "attribute": attribute.name, "value": value, "rank": entity.rank})
    truth = {"facts": told, "bits": chance.bits, "kind": "facts"}
    return WorldDocument("", " ".join(sentences), truth=truth)


def ask(index: int, split: Split, seed: int, options: Options) -> Question:
    """Question number `index`: every fact of this split's entities once, in an order that favours none."""
    land = peopled(options.country, options.people)
    items = _askable(options.country, options.people, split)
    entity, attribute = items[index % len(items)]
    value = entity.values[attribute.name]
    chance = Chance("ask facts", split, seed, index)
    statement = chance.pick(phrasings(options.country, entity.name, attribute, split))
    group = land.people if entity.kind == "person" else land.towns
    return Question(
        id="",
        prompt=statement.split(" {value}")[0].format(name=entity.name),
        question=chance.pick(attribute.questions).format(name=entity.name),
        answer=value,
        choices=four_choices(chance, land.pool(attribute.name), value),
        check={"check": "equals", "arguments": {"answer": value}},
        truth={
            "entity": entity.name,
            "kind": entity.kind,
            "attribute": attribute.name,
            "rank": entity.rank,
            "frequency": frequencies(len(group), options.zipf)[entity.rank],
            "chance_level": 1 / len(land.pool(attribute.name)),
        },
    )


@lru_cache(maxsize=32)
def _askable(country: int, people: int, split: Split) -> tuple[tuple[Entity, Attribute], ...]:
    land = peopled(country, people)
    return askable(country, (*land.people, *land.towns), split)


def count(split: Split, options: Options) -> int:
    """How many different questions there are."""
    return len(_askable(options.country, options.people, split))
