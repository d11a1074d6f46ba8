"""Pictures with known truth: shapes, colours, counts, positions, digits and charts, and questions about them.

A question about shape, colour and count together is held out by its combination: "three red rings" belongs to
one split for ever, while its shape, its colour and its count are all seen in the training split.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from trivium.kit.errors import TriviumError
from trivium.world import drawing
from trivium.world.chance import Chance, split_of
from trivium.world.document import Question, Share, Split, WorldDocument
from trivium.world.perceived import Make, Perceived, Sense

COLOURS = tuple(drawing.COLOURS)
COUNTS = ("one", "two", "three", "four")
ATTRIBUTES = ("shape", "colour", "count")
Combination = tuple[str, str, int]
"""Shape, colour and count."""


@dataclass(frozen=True)
class Options:
    """Which questions there are, how large a picture is, and the form.

    `paired`: questions 2k and 2k + 1 show the same drawing with one attribute changed. `shown: blank` gives
    an empty picture in place of the right one, `shuffled` that of another question, `none` no picture.
    """

    kind: str = "what"
    size: int = 32
    form: str = "chat"
    shown: str = "own"
    paired: bool = True
    noise: Share = 0.0


@lru_cache(maxsize=8)
def combinations(split: Split) -> tuple[Combination, ...]:
    """The combinations of shape, colour and count that belong to a split."""
    every = [
        (shape, colour, count)
        for shape in drawing.SHAPES
        for colour in COLOURS
        for count in range(1, len(COUNTS) + 1)
    ]
    return tuple(one for one in every if split_of("picture", *one, validation=0.05, test=0.15) == split)


def named(combination: Combination) -> str:
    """A combination in words: `three red rings`."""
    shape, colour, count = combination
    plural = "" if count == 1 else "es" if shape.endswith("s") else "s"
    return f"{COUNTS[count - 1]} {colour} {shape}{plural}"


def _other(chance: Chance, first: Combination, split: Split, asked: str) -> tuple[Combination, str]:
    """A combination of the same split with another answer, in as few attributes as can be; and in which."""
    place = ATTRIBUTES.index(asked) if asked in ATTRIBUTES else None
    others = [
        one for one in combinations(split) if one != first and (place is None or one[place] != first[place])
    ]
    distance = [sum(a != b for a, b in zip(one, first, strict=True)) for one in others]
    other = chance.pick([one for one, apart in zip(others, distance, strict=True) if apart == min(distance)])
    changed = [name for name, a, b in zip(ATTRIBUTES, first, other, strict=True) if a != b]
    return other, " and ".join(changed)


def _background(chance: Chance) -> int:
    return 20 + 4 * chance.below(16)


def _places(chance: Chance, count: int) -> list[tuple[float, float]]:
    """Centres of `count` shapes that do not touch: cells of a two by two grid, each a little moved."""
    cells = chance.sample([(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)], count)
    return [(x + (chance.below(9) - 4) * 0.012, y + (chance.below(9) - 4) * 0.012) for x, y in cells]


def _combined(chance: Chance, split: Split, second: bool, options: Options) -> Perceived:
    """Alike shapes: what, how many, of which colour, or all three at once."""
    chosen = chance.pick(combinations(split))
    asked = chance.pick(SEVERAL[options.kind]) if options.kind in SEVERAL else options.kind
    other, changed = _other(chance, chosen, split, asked)
    shape, colour, count = other if second else chosen
    background, radius = _background(chance), 0.15 + 0.006 * chance.below(9)
    places = _places(chance, len(COUNTS))[:count]
    picture = drawing.marks([(shape, colour, x, y, radius) for x, y in places], options.size, background)
    question, answer = {
        "what": ("What does the picture show?", named((shape, colour, count))),
        "shape": ("Which shape is in the picture?", shape),
        "colour": ("Which colour are the shapes?", colour),
        "count": ("How many shapes are in the picture?", COUNTS[count - 1]),
    }[asked]
    level = {"what": 1 / len(combinations(split)), "shape": 1 / len(drawing.SHAPES),
             "colour": 1 / len(COLOURS), "count": 1 / len(COUNTS)}[asked]  # fmt: skip
    truth = {"kind": asked, "shape": shape, "colour": colour, "count": count, "chance_level": level}
    return Perceived(picture, question, answer, {**truth, "changed": changed})


def _position(chance: Chance, split: Split, second: bool, options: Options) -> Perceived:
    """Two shapes of different colours: which of them lies on the asked side."""
    side = chance.pick(("left", "right", "top", "bottom"))
    pairs = [
        (a, b)
        for a in COLOURS
        for b in COLOURS
        if a != b and split_of("positions", *sorted((a, b)), validation=0.1, test=0.2) == split
    ]
    colours = chance.pick(pairs)
    shapes = [chance.pick(drawing.SHAPES) for _ in range(2)]
    across = side in ("left", "right")
    apart, along = 0.26 + 0.01 * chance.below(5), 0.4 + 0.05 * chance.below(5)
    low, high = (apart, along), (1 - apart, along)
    ends = [low, high] if across else [low[::-1], high[::-1]]
    colours = colours[::-1] if second else colours
    marks = [(shape, colour, x, y, 0.17) for shape, colour, (x, y) in zip(shapes, colours, ends, strict=True)]
    picture = drawing.marks(marks, options.size, _background(chance))
    where = f"at the {side}" if side in ("top", "bottom") else f"on the {side}"
    answer = colours[0 if side in ("left", "top") else 1]
    truth = {"kind": "position", "side": side, "chance_level": 0.5, "changed": "positions"}
    return Perceived(picture, f"Which colour is {where}?", answer, truth)


def _digit(chance: Chance, split: Split, second: bool, options: Options) -> Perceived:
    """One digit in print; a digit and a colour that go together belong to one split."""
    pairs = [
        (number, colour)
        for number in range(10)
        for colour in COLOURS
        if split_of("digits", number, colour, validation=0.1, test=0.2) == split
    ]
    number, colour = chance.pick(pairs)
    others = [one for one in pairs if one[0] != number]
    changed = chance.pick(others)
    number, colour = changed if second else (number, colour)
    x, y = (0.42 + 0.02 * chance.below(9) for _ in range(2))
    height = 0.55 + 0.03 * chance.below(8)
    picture = drawing.digit(str(number), options.size, colour, x, y, height, _background(chance))
    truth = {"kind": "digit", "digit": number, "colour": colour, "chance_level": 0.1, "changed": "digit"}
    return Perceived(picture, "Which digit is this?", str(number), truth)


def _chart(chance: Chance, split: Split, second: bool, options: Options) -> Perceived:
    """A chart of three bars: which is the highest or the lowest; an order of colours belongs to one split."""
    orders = [
        (a, b, c)
        for a in COLOURS
        for b in COLOURS
        for c in COLOURS
        if len({a, b, c}) == 3 and split_of("charts", a, b, c, validation=0.1, test=0.2) == split
    ]
    colours = chance.pick(orders)
    heights = [0.15 + 0.12 * step for step in chance.sample(range(6), 3)]
    asked = chance.pick(("highest", "lowest"))
    extreme = max if asked == "highest" else min
    if second:
        # The asked bar changes its height with its neighbour, so another one is the answer.
        place = heights.index(extreme(heights))
        beside = (place + 1) % 3
        heights[place], heights[beside] = heights[beside], heights[place]
    picture = drawing.bars(heights, colours, options.size, _background(chance))
    answer = colours[heights.index(extreme(heights))]
    truth = {"kind": "chart", "asked": asked, "chance_level": 1 / 3, "changed": "heights"}
    return Perceived(picture, f"Which bar is the {asked}?", answer, truth)


SEVERAL = {
    "attribute": ATTRIBUTES,
    "combined": ("what", *ATTRIBUTES),
    # Of all kinds this is the part about combinations.
    "all": ("what", *ATTRIBUTES),
}
"""Kinds that ask now for one thing, now for another."""
KINDS: dict[str, Make] = {
    **dict.fromkeys(("what", "shape", "colour", "count", "attribute", "combined"), _combined),
    "position": _position,
    "digit": _digit,
    "chart": _chart,
}


def _noisy(chance: Chance, picture: Any, options: Options) -> Any:
    """The picture with uniform noise of up to `noise` of the whole range on every pixel."""
    if not options.noise:
        return picture
    pixels = np.asarray(picture, dtype=np.float32)
    noise = np.random.default_rng(chance.below(2**32)).uniform(-255, 255, pixels.shape) * options.noise
    return drawing.pillow().Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


SENSE = Sense(
    "pictures", "show", KINDS, ("combined", "position", "digit", "chart"), drawing.picture_part,
    lambda own, options: drawing.marks([], options.size, 50), _noisy,
)  # fmt: skip


def _drawn(index: int, split: Split, seed: int, options: Options) -> WorldDocument:
    """A picture as the assistant's answer to what it shall show."""
    one = SENSE.made(index, split, seed, replace(options, kind="what"), "write")
    asked = {"role": "user", "content": f"Draw {one.answer}."}
    answer = {"role": "assistant", "content": [drawing.picture_part(one.item)]}
    return WorldDocument("", None, {"messages": [asked, answer]}, {**one.truth, "answer": one.answer})


def _checked(options: Options) -> Options:
    if not 8 <= options.size <= 1024:
        raise TriviumError(f"world:pictures draws pictures of 8 to 1024 pixels, not {options.size}.")
    return options


def write(index: int, split: Split, seed: int, options: Options) -> WorldDocument:
    """One question about a picture with its answer, as a conversation to learn from."""
    if options.form == "draw":
        if (options.kind, options.shown) != ("what", "own"):
            raise TriviumError(
                "world:pictures draws what it is asked for (`form=draw`): leave `kind` and `shown` out."
            )
        return _drawn(index, split, seed, _checked(options))
    if _checked(options).form != "pairs":
        return SENSE.document(index, split, seed, options, "chat, prompt, pairs or draw")
    drawn = SENSE.made(index, split, seed, options, "write")
    content = SENSE.content(drawn, index, split, seed, options, "write")
    other = next(
        one.answer
        for step in range(1, 1000)
        if (one := SENSE.made(index + step * 7919, split, seed, options, "write")).answer != drawn.answer
        and one.truth["kind"] == drawn.truth["kind"]
    )
    chosen, rejected = ([{"role": "assistant", "content": one}] for one in (drawn.answer, other))
    fields = {"prompt": [{"role": "user", "content": content}], "chosen": chosen, "rejected": rejected}
    return WorldDocument("", None, fields, {**drawn.truth, "answer": drawn.answer})


def ask(index: int, split: Split, seed: int, options: Options) -> Question:
    """One question about a picture; with `paired`, the next one shows the same drawing changed."""
    return SENSE.ask(index, split, seed, _checked(options))
