"""What is true of people and towns, one sentence at a time and never two on the same one in a document."""

from dataclasses import dataclass
from functools import lru_cache

from trivium.kit.errors import TriviumError
from trivium.world.chance import Chance
from trivium.world.country import Attribute, Entity, frequencies, peopled
from trivium.world.document import Question, Share, Split, WorldDocument, in_form
from trivium.world.entities import askable, draw_entity, fact_question, sentence_about


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
    sentences, stated = [], []
    people: dict[str, float] = {}
    towns: dict[str, float] = {}
    for _ in range(chance.between(options.sentences_low, options.sentences_high)):
        town = chance.happens(options.towns_share)
        group, drawn = (land.towns, towns) if town else (land.people, people)
        entity = draw_entity(chance, group, options.zipf, drawn)
        sentence, fact = sentence_about(chance, entity, options.country, split, options.questions_share)
        sentences.append(sentence)
        stated.append(fact)
    truth = {"facts": stated, "bits": chance.bits, "kind": "facts"}
    return WorldDocument("", " ".join(sentences), truth=truth)


def ask(index: int, split: Split, seed: int, options: Options) -> Question:
    """Question number `index`: every fact of this split's entities once, in an order that favours none."""
    land = peopled(options.country, options.people)
    items = _askable(options.country, options.people, split)
    fact = items[index % len(items)]
    group = land.people if fact[0].kind == "person" else land.towns
    return fact_question(
        Chance("ask facts", split, seed, index), fact, options.country, split,
        land.pool(fact[1].name), frequencies(len(group), options.zipf)[fact[0].rank],
    )  # fmt: skip


@lru_cache(maxsize=32)
def _askable(country: int, people: int, split: Split) -> tuple[tuple[Entity, Attribute], ...]:
    land = peopled(country, people)
    return askable(country, (*land.people, *land.towns), split)


def count(split: Split, options: Options) -> int:
    """How many different questions there are."""
    return len(_askable(options.country, options.people, split))
