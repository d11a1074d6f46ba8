"""Texts in the second language: plain, side by side with the first, and facts told in no other."""

from dataclasses import dataclass
from functools import lru_cache

from trivium.kit.errors import TriviumError
from trivium.world.chance import Chance, stable_number
from trivium.world.country import (
    PERSON_ATTRIBUTES,
    Attribute,
    Country,
    Entity,
    asked_split,
    country_of,
    frequencies,
)
from trivium.world.document import Question, Share, Split, WorldDocument, in_form
from trivium.world.entities import askable, draw_entity, four_choices, phrasings
from trivium.world.language import PLACES, TOPICS, VERBS, Clause, Language, language_of
from trivium.world.names import names
from trivium.world.words import AGES, CRAFTS, LOOKS, THINGS

MOST_STRANGERS = 800
KINDS = ("recall", "transfer", "to", "from")
TONGUE_ATTRIBUTES = tuple(Attribute(name, topics, topics) for name, topics in TOPICS.items())
_ENGLISH = {attribute.name: attribute for attribute in PERSON_ATTRIBUTES}


@dataclass(frozen=True)
class Options:
    """The script (own or latin), how many people are known in this tongue alone, and the kinds of text."""

    country: int = 0
    script: str = "own"
    strangers: int = 60
    zipf: float = 0.5
    facts_share: Share = 0.4
    parallel_share: Share = 0.3
    questions_share: Share = 0.1
    kind: str = "all"
    form: str = "document"


@lru_cache(maxsize=8)
def strangers(country: int, count: int) -> tuple[Entity, ...]:
    """People of whom nothing is told in the first language."""
    if not 20 <= count <= MOST_STRANGERS:
        raise TriviumError(f"world:tongue needs from 20 to {MOST_STRANGERS} strangers, not {count}.")
    land = country_of(country, 1)
    # Family names of their own: no stranger shares a name with one of the people, however many there are.
    families = names("foreign family", 16, country, {family.lower() for family in land.families})
    used: set[str] = set()
    found: list[Entity] = []
    for rank in range(count):
        chance = Chance("stranger", country, rank)
        name = ""
        while not name or name in used:
            name = f"{chance.pick(land.first_names)} {chance.pick(families)}"
        used.add(name)
        values = {attribute: chance.pick(land.pool(attribute)) for attribute in TOPICS}
        asked = asked_split(country, "stranger", rank)
        found.append(Entity(name, "stranger", rank, asked, values, TONGUE_ATTRIBUTES))
    return tuple(found)


@lru_cache(maxsize=65536)
def _objects(subject: str, verb: str, split: Split) -> tuple[str, ...]:
    """What this subject does this to in this split, and in no other."""
    order = sorted(THINGS, key=lambda thing: stable_number("clause", subject, verb, thing))
    return {"test": tuple(order[:3]), "validation": tuple(order[3:6]), "train": tuple(order[6:])}[split]


def draw_clause(chance: Chance, land: Country, split: Split) -> Clause:
    """A clause of this split."""
    if chance.happens(0.5):
        subject, age = chance.pick(CRAFTS), chance.pick(AGES)
    else:
        subject, age = chance.pick(land.first_names), ""
    verb = chance.pick(VERBS)
    thing, look = chance.pick(_objects(subject, verb, split)), chance.pick(LOOKS)
    if chance.happens(0.5):
        return Clause(subject, age, verb, thing, look, chance.pick(PLACES), chance.pick(land.towns).name)
    return Clause(subject, age, verb, thing, look)


def _facts(
    chance: Chance, split: Split, options: Options, tongue: Language
) -> tuple[str, list[dict[str, object]]]:
    sentences, told = [], []
    drawn: dict[str, float] = {}
    people = strangers(options.country, options.strangers)
    for _ in range(chance.between(3, 6)):
        person = draw_entity(chance, people, options.zipf, drawn)
        attribute = chance.pick(person.attributes)
        value = tongue.value(attribute.name, person.values[attribute.name])
        if person.asked == split and chance.happens(options.questions_share):
            asked = tongue.wonder(chance.pick(attribute.questions), person.name)
            sentences.append(f"{tongue.word('question')}: {asked} {tongue.word('answer')}: {value}.")
        else:
            topic = chance.pick(phrasings(options.country, person.name, attribute, split))
            sentences.append(tongue.state(topic, person.name, value))
        told.append({"entity": person.name, "attribute": attribute.name, "rank": person.rank, "value": value})
    return " ".join(sentences), told


def write(index: int, split: Split, seed: int, options: Options) -> WorldDocument:
    """One document: facts, or sentences with or without their translation."""
    if (chat := in_form(options.form, "tongue", lambda: ask(index, split, seed, options))) is not None:
        return chat
    if options.script not in ("own", "latin"):
        raise TriviumError(f"world:tongue has no script '{options.script}'; use own or latin.")
    if options.facts_share + options.parallel_share > 1:
        raise TriviumError("world:tongue needs facts_share + parallel_share <= 1.")
    tongue, land = language_of(options.country, options.script), country_of(options.country, 1)
    chance = Chance("tongue", split, seed, index)
    if chance.happens(options.facts_share):
        text, told = _facts(chance, split, options, tongue)
        return WorldDocument("", text, truth={"kind": "facts", "facts": told, "bits": chance.bits})
    rest = 1 - options.facts_share
    parallel = rest > 0 and chance.happens(options.parallel_share / rest)
    clauses = [draw_clause(chance, land, split) for _ in range(chance.between(2, 4))]
    if parallel:
        to = chance.happens(0.5)
        text = "\n".join(_pair(tongue, clause, to) for clause in clauses)
    else:
        text = " ".join(tongue.say(clause) for clause in clauses)
    truth = {
        "kind": "parallel" if parallel else "plain",
        "english": [clause.english for clause in clauses],
        "bits": chance.bits,
    }
    return WorldDocument("", text, truth=truth)


def _pair(tongue: Language, clause: Clause, to: bool) -> str:
    both = (f"English: {clause.english}", f"{tongue.name}: {tongue.say(clause)}")
    return "\n".join(both if to else both[::-1])


def ask(index: int, split: Split, seed: int, options: Options) -> Question:
    """A fact asked in the tongue (recall) or in English (transfer), or a translation to or from it."""
    if options.kind not in ("all", *KINDS):
        raise TriviumError(f"world:tongue asks no '{options.kind}'; use all, {', '.join(KINDS)}.")
    kind = KINDS[index % len(KINDS)] if options.kind == "all" else options.kind
    number = index // len(KINDS) if options.kind == "all" else index
    chance = Chance("ask tongue", kind, split, seed, number)
    tongue, land = language_of(options.country, options.script), country_of(options.country, 1)
    if kind in ("recall", "transfer"):
        return _ask_fact(chance, number, split, options, tongue, land, kind)
    clause = draw_clause(chance, land, split)
    given, answer = clause.english, tongue.say(clause)
    source, target = "English", tongue.name
    if kind == "from":
        given, answer, source, target = answer, given, target, source
    return Question(
        id="",
        prompt=f"{source}: {given}\n{target}:",
        question=f"Translate into {target}: {given}",
        answer=answer,
        check={"check": "equals", "arguments": {"answer": answer}},
        truth={"kind": kind},
    )


def _ask_fact(
    chance: Chance, number: int, split: Split, options: Options, tongue: Language, land: Country, kind: str
) -> Question:
    items = _askable(options.country, options.strangers, split)
    person, attribute = items[number % len(items)]
    value, pool = person.values[attribute.name], land.pool(attribute.name)
    if kind == "recall":
        topic = chance.pick(phrasings(options.country, person.name, attribute, split))
        value, pool = (
            tongue.value(attribute.name, value),
            tuple(tongue.value(attribute.name, one) for one in pool),
        )
        prompt = f"{tongue.word(topic)} {tongue.spell(person.name)}"
        question = tongue.wonder(chance.pick(attribute.questions), person.name)
    else:
        english = _ENGLISH[attribute.name]
        prompt = chance.pick(english.statements).split(" {value}")[0].format(name=person.name)
        question = chance.pick(english.questions).format(name=person.name)
    return Question(
        id="",
        prompt=prompt,
        question=question,
        answer=value,
        choices=four_choices(chance, pool, value),
        check={"check": "equals", "arguments": {"answer": value}},
        truth={
            "kind": kind,
            "entity": person.name,
            "attribute": attribute.name,
            "rank": person.rank,
            "frequency": frequencies(options.strangers, options.zipf)[person.rank],
            "chance_level": 1 / len(pool),
        },
    )


@lru_cache(maxsize=32)
def _askable(country: int, count: int, split: Split) -> tuple[tuple[Entity, Attribute], ...]:
    return askable(country, strangers(country, count), split)


def count(split: Split, options: Options) -> int | None:
    """How many different questions there are: translations have no end, facts have one each."""
    facts = len(_askable(options.country, options.strangers, split))
    return {"recall": facts, "transfer": facts, "all": facts * len(KINDS)}.get(options.kind)
