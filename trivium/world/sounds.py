"""Sounds with known truth: tones whose pitch, order, number and length are asked for.

A melody of three tones belongs to one split for ever: its pitches are all heard in training, in other orders.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

from trivium.kit.errors import TriviumError
from trivium.world.chance import Chance, split_of
from trivium.world.document import Share, Split
from trivium.world.drawing import sound_part
from trivium.world.perceived import Make, Perceived, Sense

PITCHES = {"do": 262.0, "re": 330.0, "mi": 415.0, "fa": 523.0, "sol": 659.0, "la": 831.0}
"""Six pitches, two thirds apart, so that they can be told by ear."""
COUNTS = ("one", "two", "three", "four")
LENGTHS = {"short": 0.1, "long": 0.3}
RATE = 16_000


@dataclass(frozen=True)
class Options:
    """Which questions there are, and the form; `paired` and `shown` are as in world:pictures."""

    kind: str = "melody"
    form: str = "chat"
    shown: str = "own"
    paired: bool = True
    noise: Share = 0.01


def tone(pitch: float, seconds: float, phase: float, strength: float) -> np.ndarray:
    """A sine of this frequency in hertz with soft ends: [samples]."""
    times = np.arange(round(seconds * RATE)) / RATE
    ramp = np.clip(np.minimum(times, times[::-1]) / 0.01, 0, 1)
    return strength * ramp * np.sin(2 * np.pi * (pitch * times + phase))


def played(tones: list[tuple[float, float]], chance: Chance, noise: float) -> np.ndarray:
    """Tones (pitch, seconds) one after the other with short pauses and a little noise: [samples]."""
    strength = 0.3 + 0.05 * chance.below(8)
    gap = np.zeros(round(0.05 * RATE))
    pieces = [gap[: chance.below(len(gap))]]
    for pitch, seconds in tones:
        pieces += [tone(pitch, seconds, chance.below(16) / 16, strength), gap]
    samples = np.concatenate(pieces)
    generator = np.random.default_rng(chance.below(2**32))
    return samples + noise * generator.standard_normal(len(samples))


@lru_cache(maxsize=32)
def melodies(split: Split, what: str, size: int, choices: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """The sequences of `size` choices that belong to a split."""
    every = product(choices, repeat=size)
    return tuple(one for one in every if split_of(what, *one, validation=0.1, test=0.2) == split)


def _other(chance: Chance, first: tuple[str, ...], every: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """A sequence of the same split that differs in one place, where there is one."""
    near = [one for one in every if sum(a != b for a, b in zip(one, first, strict=True)) == 1]
    return chance.pick(near or [one for one in every if one != first])


def _melody(chance: Chance, split: Split, second: bool, options: Options) -> Perceived:
    """Three tones in order."""
    every = melodies(split, "melody", 3, tuple(PITCHES))
    first = chance.pick(every)
    other = _other(chance, first, every)
    notes = other if second else first
    samples = played([(PITCHES[note], 0.2) for note in notes], chance, options.noise)
    truth = {"kind": "melody", "notes": list(notes), "chance_level": 1 / len(every)}
    return Perceived(samples, "Which notes are played?", " ".join(notes), truth)


def _differing(chance: Chance, every: Sequence[tuple[str, ...]], second: bool, what: str) -> tuple[str, ...]:
    """One of those with another answer; none is needed for the first sound of a pair."""
    if not every and second:
        raise TriviumError(
            f"world:sounds has no second {what} in this split; ask without pairs, or in another split."
        )
    return chance.pick(every) if every else ()


def _pitch(chance: Chance, split: Split, second: bool, options: Options) -> Perceived:
    """One tone; a pitch with a length belongs to one split."""
    every = tuple(
        one
        for one in product(PITCHES, ("0.16", "0.2", "0.24", "0.28"))
        if split_of("pitch", *one, validation=0.1, test=0.2) == split
    )
    first = chance.pick(every)
    other = _differing(chance, [one for one in every if one[0] != first[0]], second, "pitch")
    note, seconds = other if second else first
    samples = played([(PITCHES[note], float(seconds))], chance, options.noise)
    return Perceived(
        samples, "Which note is this?", note, {"kind": "pitch", "chance_level": 1 / len(PITCHES)}
    )


def _count(chance: Chance, split: Split, second: bool, options: Options) -> Perceived:
    """So many tones of one pitch; a pitch with a number belongs to one split."""
    every = tuple(
        one for one in product(PITCHES, COUNTS) if split_of("tones", *one, validation=0.1, test=0.2) == split
    )
    first = chance.pick(every)
    other = _differing(chance, [one for one in every if one[1] != first[1]], second, "number of tones")
    note, count = other if second else first
    samples = played([(PITCHES[note], 0.12)] * (COUNTS.index(count) + 1), chance, options.noise)
    return Perceived(samples, "How many tones are there?", count, {"kind": "count", "chance_level": 0.25})


def _duration(chance: Chance, split: Split, second: bool, options: Options) -> Perceived:
    """Three tones, each short or long; a pitch with such a rhythm belongs to one split."""
    every = tuple(
        one
        for one in product(PITCHES, LENGTHS, LENGTHS, LENGTHS)
        if split_of("rhythm", *one, validation=0.1, test=0.2) == split
    )
    first = chance.pick(every)
    other = _differing(chance, [one for one in every if one[1:] != first[1:]], second, "rhythm")
    note, *rhythm = other if second else first
    samples = played([(PITCHES[note], LENGTHS[length]) for length in rhythm], chance, options.noise)
    return Perceived(
        samples, "How long are the tones?", " ".join(rhythm), {"kind": "duration", "chance_level": 1 / 8}
    )


KINDS: dict[str, Make] = {"melody": _melody, "pitch": _pitch, "count": _count, "duration": _duration}
SENSE = Sense(
    "sounds", "play", KINDS, tuple(KINDS), lambda samples: sound_part(samples, RATE),
    lambda own, options: np.zeros(len(own)),
)  # fmt: skip
write = SENSE.document
ask = SENSE.ask
