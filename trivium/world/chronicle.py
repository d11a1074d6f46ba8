"""Chronicles: long documents with something to find in them, at any length and depth."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from trivium.kit.errors import TriviumError
from trivium.world import prose
from trivium.world.chance import Chance, split_of
from trivium.world.country import country_of
from trivium.world.document import Question, Split, WorldDocument
from trivium.world.words import ANIMALS, GOODS, THINGS

KINDS = ("passkey", "needle", "keys", "variables", "words")


MOST_KEYS, MOST_DIGITS = 64, 100


@dataclass(frozen=True)
class Options:
    """How long documents are (`tokens` or `characters`), and how deep what is sought lies (-1: anywhere)."""

    country: int = 0
    kind: str = "all"
    characters: int = 2000
    tokens: int = 0
    characters_per_token: float = 3.0
    depth: float = -1.0
    digits: int = 5
    keys: int = 4
    hops: int = 3
    asks: int = 1

    @property
    def size(self) -> int:
        """The wished length in characters."""
        return round(self.tokens * self.characters_per_token) if self.tokens else self.characters


@dataclass(frozen=True)
class Hidden:
    """What is put into the filler, what is asked at the end, and the piece that a depth is said of."""

    pieces: tuple[str, ...]
    asked: tuple[tuple[str, str], ...]
    sought: int | None = 0


def _number(chance: Chance, split: Split, digits: int) -> str:
    # Rejecting the other splits' numbers makes the rest likelier; the share is known, so the bits stay right.
    before = chance.bits
    while True:
        chance.bits = before + {"train": -0.321928, "validation": -3.321928, "test": -3.321928}[split]
        number = "".join(str(chance.below(10)) for _ in range(digits))
        if split_of("key", number) == split:
            return number


def _passkey(chance: Chance, split: Split, options: Options) -> Hidden:
    key = _number(chance, split, options.digits)
    return Hidden(
        (f"The pass key is {key}. Remember it. {key} is the pass key.",), (("The pass key is", key),)
    )


def _named_keys(chance: Chance, split: Split, options: Options, count: int, asks: int) -> Hidden:
    names = chance.sample(country_of(options.country, 1).first_names, count)
    keys = [_number(chance, split, options.digits) for _ in names]
    pieces = tuple(f"The number of {name} is {key}." for name, key in zip(names, keys))
    places = chance.sample(range(count), asks)
    asked = tuple((f"The number of {names[place]} is", keys[place]) for place in places)
    return Hidden(pieces, asked, places[0])


def _needle(chance: Chance, split: Split, options: Options) -> Hidden:
    # One needle among distractors of another wording.
    one = _named_keys(chance, split, options, 1, 1)
    towns = chance.sample(country_of(options.country, 1).towns, 2)
    false = [
        f"The number of the inn in {town.name} is {_number(chance, split, options.digits)}." for town in towns
    ]
    return Hidden((*false[:1], *one.pieces, *false[1:]), one.asked, 1)


def _keys(chance: Chance, split: Split, options: Options) -> Hidden:
    return _named_keys(chance, split, options, options.keys, min(options.asks, options.keys))


def _variables(chance: Chance, split: Split, options: Options) -> Hidden:
    """Two chains of boxes, each holding what the one before it holds; the end of the first is asked."""
    boxes = chance.sample(THINGS, min(2 * (options.hops + 1), len(THINGS)))
    half = len(boxes) // 2
    chains = []
    for chain in (boxes[:half], boxes[half:]):
        number = _number(chance, split, options.digits)
        told = [f"The {chain[0]} holds {number}."]
        told += [f"The {after} holds the same as the {before}." for before, after in pairwise(chain)]
        chains.append((told, chain[-1], number))
    pieces = tuple(piece for pair in zip(chains[0][0], chains[1][0]) for piece in pair)
    return Hidden(pieces, ((f"In the end the {chains[0][1]} holds", chains[0][2]),))


def _common_word(chance: Chance, split: Split, options: Options) -> Hidden:
    """A list of words in which one comes most often."""
    drawn = chance.sample(ANIMALS + GOODS, 6)
    counts = (6, 3, 3, 2, 1, 1)
    listed = chance.shuffled([word for word, count in zip(drawn, counts) for _ in range(count)])
    # The text does not tell which of two equal words came first, nor which of two as common was drawn.
    same = math.prod(math.factorial(count) for count in counts)
    chance.bits -= math.log2(same * math.prod(math.factorial(times) for times in Counter(counts).values()))
    lists = [listed[start : start + 4] for start in range(0, len(listed), 4)]
    pieces = tuple(f"A cart brought {', '.join(some)}." for some in lists)
    return Hidden(pieces, (("What the carts brought most often is", drawn[0]),), None)


_MAKERS: dict[str, Callable[[Chance, Split, Options], Hidden]] = {
    "passkey": _passkey,
    "needle": _needle,
    "keys": _keys,
    "variables": _variables,
    "words": _common_word,
}


def _checked(options: Options) -> None:
    if options.kind not in ("all", *KINDS):
        raise TriviumError(f"world:chronicle has no kind '{options.kind}'; it has all, {', '.join(KINDS)}.")
    if not (options.depth == -1 or 0 <= options.depth <= 1):
        raise TriviumError("The depth of world:chronicle lies between 0 and 1, or is -1 for anywhere.")
    if (
        min(options.size, options.digits, options.keys, options.asks) < 1
        or not 1 <= options.hops < len(THINGS) // 2
    ):
        raise TriviumError("world:chronicle needs characters, digits, keys, asks and hops of at least 1.")
    if options.keys > MOST_KEYS or options.digits > MOST_DIGITS:
        raise TriviumError(f"world:chronicle hides at most {MOST_KEYS} keys of {MOST_DIGITS} digits.")


@dataclass(frozen=True)
class _Chronicle:
    body: str
    asked: tuple[tuple[str, str], ...]
    kind: str
    depth: float
    bits: float


def _compose(key: str, index: int, split: Split, seed: int, options: Options) -> _Chronicle:
    _checked(options)
    chance = Chance("chronicle", key, split, seed, index)
    kind = chance.pick(KINDS) if options.kind == "all" else options.kind
    hidden = _MAKERS[kind](chance, split, options)
    asked_size = sum(len(prompt) + len(answer) + 3 for prompt, answer in hidden.asked)
    left = options.size - asked_size - sum(len(piece) + 1 for piece in hidden.pieces)
    filler: list[str] = []
    while True:
        before = chance.bits
        text = prose.text(chance, options.country, split)
        left -= len(text) + 1
        if left < 0:
            # This text no longer fits: it is not written, so its bits do not count.
            chance.bits = before
            break
        filler += text.replace(". ", ".\n").split("\n")
    places = _places(chance, len(filler), hidden, options.depth)
    parts: list[str] = []
    for number in range(len(filler) + 1):
        parts += [piece for piece, place in zip(hidden.pieces, places) if place == number]
        parts += filler[number : number + 1]
    # Words are counted over all of the text: their depth is that of their middle.
    place = sum(places) / len(places) if hidden.sought is None else places[hidden.sought]
    depth = place / max(len(filler), 1)
    return _Chronicle(" ".join(parts), hidden.asked, kind, depth, chance.bits)


def _places(chance: Chance, sentences: int, hidden: Hidden, depth: float) -> list[int]:
    """Before which sentence each piece stands: the sought one at its depth, the others anywhere."""
    fixed = hidden.sought if depth >= 0 else None
    count = len(hidden.pieces) - (fixed is not None)
    places = sorted(chance.between(0, sentences) for _ in range(count))
    if count:
        chance.bits -= _log2_orders(Counter(places))
    if fixed is not None:
        places.insert(fixed, round(depth * sentences))
    return places


def _log2_orders(counts: Counter[int]) -> float:
    """How many bits an order of these would cost that the text does not show."""
    orders = math.factorial(counts.total())
    for count in counts.values():
        orders //= math.factorial(count)
    return math.log2(orders)


def write(index: int, split: Split, seed: int, options: Options) -> WorldDocument:
    """One chronicle that ends with its questions answered."""
    one = _compose("write", index, split, seed, options)
    text = " ".join((one.body, *(f"{prompt} {answer}." for prompt, answer in one.asked)))
    truth = {
        "kind": one.kind,
        "depth": one.depth,
        "answers": [answer for _, answer in one.asked],
        "characters": len(text),
        "bits": one.bits,
    }
    return WorldDocument("", text, truth=truth)


def ask(index: int, split: Split, seed: int, options: Options) -> Question:
    """One chronicle to be continued with what was hidden in it."""
    one = _compose("ask", index, split, seed, options)
    prompt, answer = one.asked[0]
    return Question(
        id="",
        prompt=f"{one.body} {prompt}",
        question=f"{one.body}\n{prompt}",
        answer=answer,
        check={"check": "equals", "arguments": {"answer": answer}},
        truth={"kind": one.kind, "depth": one.depth, "characters": len(one.body) + len(prompt) + 1},
    )
