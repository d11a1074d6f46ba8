"""Worked solutions to sums with a mistake in them: what a judge of steps learns to find."""

from collections.abc import Sequence

from trivium.world.chance import Chance

RESULT = {"+": lambda total, other: total + other, "-": lambda total, other: total - other,
          "*": lambda total, other: total * other}  # fmt: skip
MISTAKES = ("result", "sign", "number", "total", "left out", "twice", "swapped", "too early")


def with_mistake(steps: Sequence[str], chance: Chance, most: int) -> tuple[list[str], int]:
    """The steps with one mistake at a random place, and what they come to; they go on from the wrong number.

    A wrong result, operation or number, a total that is not the last one, an event of the story that is left
    out, counted twice or too early, or an answer before the last event. Numbers stay within 0 and `most`.
    """
    moves = [(step.split()[1], int(step.split()[2])) for step in steps]
    total, place = int(steps[0].split()[0]), chance.below(len(moves))
    same = {"too early"} if place == 0 else set()
    if moves[place : place + 1] * 2 == moves[place : place + 2] or place + 1 == len(moves):
        same.add("swapped")
    mistake = chance.pick([one for one in MISTAKES if one not in same])
    if mistake == "left out" or (mistake == "twice" and place == 0):
        moves = [*moves[:place], *moves[place + 1 :]]
    elif mistake == "twice":
        moves = [*moves[:place], *moves[place - 1 :]]
    elif mistake == "swapped":
        moves[place : place + 2] = reversed(moves[place : place + 2])
    elif mistake == "too early":
        moves = moves[:place]
    lines = []
    for turn, (sign, other) in enumerate(moves):
        if turn == place and mistake == "sign":
            sign = chance.pick([one for one in RESULT if one != sign])
        elif turn == place and mistake == "number":
            other = _near(other, chance, most)
        elif turn == place and mistake == "total":
            total = _near(total, chance, most)
        result = min(max(RESULT[sign](total, other), 0), most)
        if turn == place and mistake == "result":
            result = _near(result, chance, most)
        lines.append(f"{total} {sign} {other} = {result}")
        total = result
    return lines, total


def labels(solution: Sequence[str], right: Sequence[str]) -> list[bool]:
    """Whether each line is right: it and all before it are those of the right solution."""
    found, holds = [], True
    for place, line in enumerate(solution):
        holds = holds and place < len(right) and line == right[place]
        found.append(holds)
    return found


def _near(number: int, chance: Chance, most: int) -> int:
    """Another number, at most five away."""
    near = range(max(0, number - 5), min(number + 5, most) + 1)
    return chance.pick([one for one in near if one != number])
