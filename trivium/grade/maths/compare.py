"""Whether two answers are the same answer."""

import math
import random
from fractions import Fraction

from trivium.grade.maths.answers import Answer, Based, Collection, Equation, Interval, Quantity, Words
from trivium.grade.maths.expressions import (
    PRIME,
    Expression,
    exact,
    in_field,
    in_plane,
    letters,
    node,
    number,
)
from trivium.grade.maths.units import Unit

_CLOSE = 1e-12
_POINTS = 6


class Undecided(Exception):
    """Neither sameness nor difference could be shown."""


def same(gold: Answer, answer: Answer, tolerance: float = 0.0) -> bool:
    """Whether an answer says what the gold answer says, `tolerance` being relative and for numbers alone."""
    if isinstance(answer, Collection) and not isinstance(gold, Collection) and len(answer.items) == 1:
        return same(gold, answer.items[0], tolerance)
    if isinstance(gold, Collection) and not isinstance(answer, Collection) and len(gold.items) == 1:
        return same(gold.items[0], answer, tolerance)
    if isinstance(gold, Quantity) and isinstance(answer, Quantity):
        return _same_quantity(gold, answer, tolerance)
    if isinstance(gold, Collection) and isinstance(answer, Collection):
        return _same_collection(gold, answer, tolerance)
    if isinstance(gold, Interval) or isinstance(answer, Interval):
        return _same_interval(gold, answer)
    if isinstance(gold, Based) or isinstance(answer, Based):
        return _same_based(gold, answer)
    if isinstance(gold, Equation) and isinstance(answer, Equation):
        return gold.relation == answer.relation and _proportional(
            gold.difference, answer.difference, gold.relation != "="
        )
    if isinstance(gold, Equation | Quantity) and isinstance(answer, Equation | Quantity):
        return _same_named_equation(gold, answer)
    if isinstance(gold, Words) or isinstance(answer, Words):
        return _spelled(gold) == _spelled(answer) is not None
    return False


def _spelled(answer: Answer) -> str | None:
    """Words, or a lone letter, which is how the choice in a list of choices is named."""
    if isinstance(answer, Words):
        return answer.text
    if isinstance(answer, Quantity) and answer.expression.kind == "letter":
        return str(answer.expression[1]).casefold()
    return None


def _same_quantity(gold: Quantity, answer: Quantity, tolerance: float) -> bool:
    if gold.name and answer.name and gold.name != answer.name:
        return False
    scale = _scale(gold.unit, answer.unit)
    if scale is None:
        return False
    left, right = gold.expression, answer.expression
    if scale != 1:
        right = node("*", number(scale), right)
    if equal(left, right, tolerance):
        return True
    if gold.percent != answer.percent:
        # Fifty per cent is one half, and is also what a question "how many per cent?" means by 50.
        hundredth = number(Fraction(1, 100))
        if gold.percent:
            return equal(node("*", left, hundredth), right, tolerance)
        return equal(left, node("*", right, hundredth), tolerance)
    return False


def _scale(gold: Unit | None, answer: Unit | None) -> Fraction | None:
    """What to multiply the answer with; a unit that one side leaves out is the other's."""
    if gold is None or answer is None or gold == answer:
        return Fraction(1)
    return answer[0] / gold[0] if gold[1] == answer[1] else None


def _same_collection(gold: Collection, answer: Collection, tolerance: float) -> bool:
    if gold.kind in ("set", "union") and answer.kind in ("set", "union"):
        wanted, given = (_different(part.items, tolerance) for part in (gold, answer))
        if len(wanted) != len(given):
            return False
        rest = list(given)
        for item in wanted:
            match = next((other for other in rest if same(item, other, tolerance)), None)
            if match is None:
                return False
            rest.remove(match)
        return True
    if gold.kind != answer.kind or len(gold.items) != len(answer.items):
        return False
    return all(same(left, right, tolerance) for left, right in zip(gold.items, answer.items, strict=True))


def _different(items: tuple[Answer, ...], tolerance: float) -> list[Answer]:
    kept: list[Answer] = []
    for item in items:
        if not any(same(other, item, tolerance) for other in kept):
            kept.append(item)
    return kept


def _same_interval(gold: Answer, answer: Answer) -> bool:
    left, right = _as_interval(gold), _as_interval(answer)
    return (
        left is not None
        and right is not None
        and (left.low_closed, left.high_closed) == (right.low_closed, right.high_closed)
        and equal(left.low, right.low)
        and equal(left.high, right.high)
    )


def _as_interval(answer: Answer) -> Interval | None:
    if isinstance(answer, Interval):
        return answer
    if isinstance(answer, Collection) and answer.kind == "tuple" and len(answer.items) == 2:
        low, high = answer.items
        if isinstance(low, Quantity) and isinstance(high, Quantity):
            # A pair in round brackets is also how an open interval is written.
            return Interval(low.expression, high.expression, False, False)
    return None


def _same_based(gold: Answer, answer: Answer) -> bool:
    if isinstance(gold, Based) and isinstance(answer, Based):
        return gold == answer
    based, other = (gold, answer) if isinstance(gold, Based) else (answer, gold)
    assert isinstance(based, Based)
    if not isinstance(other, Quantity):
        return False
    value = exact(other.expression)
    # The question names the base, so the digits alone are the answer without its unit.
    return value is not None and value.denominator == 1 and str(value.numerator) == based.digits


def _same_named_equation(gold: Equation | Quantity, answer: Equation | Quantity) -> bool:
    """y = 2x + 1 read as a named value on one side and as an equation on the other."""
    equations = []
    for side in (gold, answer):
        if isinstance(side, Equation):
            equations.append(side)
        elif side.name is not None and len(side.name) == 1:
            equations.append(
                Equation(node("+", node("letter", side.name), node("negative", side.expression)), "=")
            )
        else:
            return False
    left, right = equations
    return left.relation == right.relation == "=" and _proportional(left.difference, right.difference, False)


def equal(left: Expression, right: Expression, tolerance: float = 0.0) -> bool:
    """Whether two expressions are the same number or the same function of their letters."""
    if left == right:
        return True
    first, second = exact(left), exact(right)
    if first is not None and second is not None:
        if tolerance:
            return abs(first - second) <= Fraction(tolerance) * max(abs(first), abs(second))
        return first == second
    unknowns = sorted(letters(left) | letters(right))
    if len(unknowns) > 8:
        raise Undecided("too many unknowns")
    chance = random.Random(repr((left, right)))
    verdict = _equal_in_field(left, right, unknowns, chance)
    if verdict is not None:
        return verdict
    # A long decimal is never a surd, however many of its digits agree.
    for value, other in ((first, second), (second, first)):
        if value is not None and other is None and value.denominator > 10**9 and not tolerance:
            return False
    return _equal_in_plane(left, right, unknowns, chance, tolerance)


def _equal_in_field(
    left: Expression, right: Expression, unknowns: list[str], chance: random.Random
) -> bool | None:
    agreed = 0
    for _ in range(_POINTS):
        values = {unknown: chance.randrange(2, PRIME) for unknown in unknowns}
        first, second = in_field(left, values), in_field(right, values)
        if first is None or second is None:
            continue
        if first != second:
            return False
        agreed += 1
    return True if agreed >= 3 else None


def _equal_in_plane(
    left: Expression, right: Expression, unknowns: list[str], chance: random.Random, tolerance: float
) -> bool:
    agreed = 0
    for point in range(4 * _POINTS):
        sign = -1 if point % 3 == 2 else 1
        values = {unknown: complex(sign * chance.uniform(0.3, 2.7)) for unknown in unknowns}
        try:
            first, second = in_plane(left, values), in_plane(right, values)
        except (ArithmeticError, ValueError):
            continue
        if not _finite(first) or not _finite(second):
            if not unknowns:
                return first == second
            continue
        # Beyond the reals a root or logarithm has many branches, and which is meant is a convention.
        if unknowns and (abs(first.imag) > 1e-9 or abs(second.imag) > 1e-9):
            continue
        if abs(first - second) > max(tolerance, _CLOSE) * max(1e-300, abs(first), abs(second)) and (
            tolerance or abs(first - second) > _CLOSE
        ):
            return False
        agreed += 1
        if not unknowns:
            return True
    if agreed < 3:
        raise Undecided("the expressions have no value at the points tried")
    return True


def _finite(value: complex) -> bool:
    return math.isfinite(value.real) and math.isfinite(value.imag)


def _proportional(left: Expression, right: Expression, positive: bool) -> bool:
    """Whether one is a constant (positive, for an inequality) times the other, so both vanish together."""
    unknowns = sorted(letters(left) | letters(right))
    chance = random.Random(repr((left, right)))
    ratio: complex | None = None
    for _ in range(_POINTS):
        values = {unknown: complex(chance.uniform(0.3, 2.7)) for unknown in unknowns}
        try:
            now = in_plane(left, values) / in_plane(right, values)
        except (ArithmeticError, ValueError) as error:
            raise Undecided("the equations have no value at the points tried") from error
        if ratio is None:
            ratio = now
        if abs(now - ratio) > 1e-9 * max(1.0, abs(ratio)):
            return False
    return ratio is not None and abs(ratio) > 1e-12 and (not positive or ratio.real > 0)
