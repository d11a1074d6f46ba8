"""The second language: its letters, its words and its grammar."""

from dataclasses import dataclass
from functools import lru_cache

from trivium.world.chance import Chance
from trivium.world.names import names
from trivium.world.words import AGES, ANIMALS, CRAFTS, LOOKS, THINGS, words

VERBS = words("sees takes sells finds wants brings hides paints breaks cleans carries loses")
PLACES = words("in near behind before")
TOPICS: dict[str, tuple[str, ...]] = {
    "birthplace": words("birthplace cradle origin source root beginning"),
    "home": words("home house roof hearth door bed"),
    "craft": words("craft trade work skill calling task"),
    "animal": words("animal beast pet companion creature follower"),
}
_PARTICLES = words("is what question answer the")
_LOWER, _UPPER = 0x561, 0x531
_LETTERS = 36


@dataclass(frozen=True)
class Clause:
    """Who does what to what, and where; `subject` is a craft with an age, or a first name without one."""

    subject: str
    age: str
    verb: str
    thing: str
    look: str
    place: str = ""
    town: str = ""

    @property
    def english(self) -> str:
        """Subject, verb, object, place; what describes stands before what it describes."""
        who = f"The {self.age} {self.subject}" if self.age else self.subject
        where = f" {self.place} {self.town}" if self.place else ""
        return f"{who} {self.verb} the {self.look} {self.thing}{where}."


class Language:
    """A bijection of words and letters, and another order: place, subject, object, verb."""

    def __init__(self, country: int, script: str):
        chance = Chance("letters", country)
        order = chance.sample(range(_LETTERS), 26)
        self._letters = {
            chr(ord("a") + place): chr(_LOWER + letter) if script == "own" else chr(ord("a") + place)
            for place, letter in enumerate(order)
        }
        self._letters |= {
            chr(ord("A") + place): chr(_UPPER + letter) if script == "own" else chr(ord("A") + place)
            for place, letter in enumerate(order)
        }
        topics = tuple(word for synonyms in TOPICS.values() for word in synonyms)
        english = dict.fromkeys(
            (*CRAFTS, *AGES, *LOOKS, *THINGS, *ANIMALS, *VERBS, *PLACES, *topics, *_PARTICLES)
        )
        taken: set[str] = set()
        self.name = names("language", 1, country, taken)[0]
        foreign = names("word", len(english), country, taken)
        self._words = {word: self.spell(new.lower()) for word, new in zip(english, foreign)}
        self.object_ending = self.spell("u")

    def spell(self, text: str) -> str:
        """Names keep their sound: letter by letter in the tongue's own script."""
        return "".join(self._letters.get(letter, letter) for letter in text)

    def word(self, english: str) -> str:
        return self._words[english]

    def say(self, clause: Clause) -> str:
        """Place before all else, descriptions after their noun, the object marked, the verb last."""
        parts = []
        if clause.place:
            parts += [self.spell(clause.town), self.word(clause.place)]
        if clause.age:
            parts += [self.word(clause.subject), self.word(clause.age)]
        else:
            parts.append(self.spell(clause.subject))
        parts += [
            self.word(clause.thing) + self.object_ending,
            self.word(clause.look),
            self.word(clause.verb),
        ]
        return " ".join(parts) + "."

    def value(self, attribute: str, value: str) -> str:
        """The value of an attribute: names are spelt, words are translated."""
        return self.word(value) if attribute in ("craft", "animal") else self.spell(value)

    def state(self, topic: str, name: str, value: str) -> str:
        """A fact, topic first; `value` is already in the tongue."""
        return f"{self.word(topic)} {self.spell(name)} {value} {self.word('is')}."

    def wonder(self, topic: str, name: str) -> str:
        """The question for a fact."""
        return f"{self.word('what')} {self.word(topic)} {self.spell(name)} {self.word('is')}?"


@lru_cache(maxsize=8)
def language_of(country: int, script: str) -> Language:
    """The second language of this country."""
    return Language(country, script)
