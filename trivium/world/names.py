"""Pronounceable invented names, short enough to become one or two tokens."""

from trivium.world.chance import Chance
from trivium.world.words import listed, words

_ONSETS = listed("onsets")
_VOWELS = listed("vowels")
_CODAS = listed("codas")
_TOWN_ENDINGS = listed("town_endings")
_HOUSE_ENDINGS = listed("house_endings")
_AVOIDED = frozenset(listed("avoided"))


def _first(chance: Chance, endings: str) -> str:
    return chance.pick(_ONSETS) + chance.pick(_VOWELS) + chance.pick(_ONSETS) + chance.pick(words(endings))


def _syllable(chance: Chance) -> str:
    return chance.pick(_ONSETS) + chance.pick(_VOWELS) + chance.pick(_CODAS)


def _shape(kind: str, chance: Chance) -> str:
    if kind == "woman":
        return _first(chance, "a ia ina")
    if kind == "man":
        return _first(chance, "o on us")
    if kind in ("family", "foreign family"):
        return _syllable(chance) + _syllable(chance)
    if kind == "town":
        return _syllable(chance) + chance.pick(_TOWN_ENDINGS)
    if kind == "house":
        return _syllable(chance) + chance.pick(_ONSETS) + chance.pick(_HOUSE_ENDINGS)
    return chance.pick(_ONSETS) + chance.pick(_VOWELS) + _syllable(chance)


def names(kind: str, count: int, country: int, taken: set[str]) -> list[str]:
    """`count` new names of a kind (woman, man, family, town, house, or any other), none of them taken."""
    chance = Chance("names", kind, country)
    found: list[str] = []
    while len(found) < count:
        name = _shape(kind, chance)
        if name not in _AVOIDED and name not in taken:
            taken.add(name)
            found.append(name.capitalize())
    return found
