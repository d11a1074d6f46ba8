"""Arithmetic as a tree, and three ways to evaluate it: exactly, in a prime field, in the complex plane."""

import cmath
import math
from fractions import Fraction
from typing import Any

PRIME = (1 << 61) - 1
_LARGEST_BITS = 60_000
_FUNCTIONS = {
    "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "arcsin": cmath.asin, "arccos": cmath.acos,
    "arctan": cmath.atan, "sinh": cmath.sinh, "cosh": cmath.cosh, "tanh": cmath.tanh, "ln": cmath.log,
    "exp": cmath.exp, "cot": lambda z: 1 / cmath.tan(z), "sec": lambda z: 1 / cmath.cos(z),
    "csc": lambda z: 1 / cmath.sin(z),
}  # fmt: skip
FUNCTION_NAMES = frozenset(_FUNCTIONS) | {"log", "sqrt", "abs", "gcd", "lcm", "max", "min", "floor", "ceil"}


class Expression(tuple[Any, ...]):
    """A node: its kind, then its parts. Kinds: number, letter, constant, + * / ^ negative, call."""

    __slots__ = ()

    @property
    def kind(self) -> str:
        kind: str = self[0]
        return kind


def number(value: int | Fraction) -> Expression:
    """A leaf that is a rational number."""
    return Expression(("number", Fraction(value)))


def node(kind: str, *parts: Any) -> Expression:
    """A node with these parts."""
    return Expression((kind, *parts))


def letters(expression: Expression) -> frozenset[str]:
    """The unknowns in an expression."""
    if expression.kind == "letter":
        return frozenset({expression[1]})
    found: set[str] = set()
    for part in expression[1:]:
        if isinstance(part, Expression):
            found |= letters(part)
    return frozenset(found)


def exact(expression: Expression) -> Fraction | None:
    """The rational number this is, or None where it is not one or is too large to write out."""
    kind = expression.kind
    if kind == "number":
        value: Fraction = expression[1]
        return value
    if kind in ("letter", "constant"):
        return None
    if kind == "call":
        return _exact_call(expression)
    parts = [exact(part) for part in expression[1:]]
    if any(part is None for part in parts):
        return None
    first, *rest = (part for part in parts if part is not None)
    if kind == "negative":
        return -first
    second = rest[0]
    if kind == "+":
        return first + second
    if kind == "*":
        return first * second if _bits(first) + _bits(second) < _LARGEST_BITS else None
    if kind == "/":
        return first / second if second and _bits(first) + _bits(second) < _LARGEST_BITS else None
    assert kind == "^"
    return _exact_power(first, second)


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if base == 0:
        return Fraction(0) if exponent > 0 else None
    if abs(exponent.numerator) * _bits(base) > _LARGEST_BITS or exponent.denominator > 64:
        return None
    root = exponent.denominator
    if root > 1:
        if base < 0:
            return None
        top, bottom = _whole_root(base.numerator, root), _whole_root(base.denominator, root)
        if top is None or bottom is None:
            return None
        base = Fraction(top, bottom)
    power = base**exponent.numerator
    return power if isinstance(power, Fraction) else Fraction(power)


def _whole_root(value: int, root: int) -> int | None:
    if root == 2:
        guess = math.isqrt(value)
        return guess if guess * guess == value else None
    low, high = 0, 1 << (value.bit_length() // root + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**root <= value else (low, middle - 1)
    return low if low**root == value else None


def _exact_call(expression: Expression) -> Fraction | None:
    name = expression[1]
    values = [exact(part) for part in expression[2:]]
    if any(value is None for value in values):
        return None
    known = [value for value in values if value is not None]
    first = known[0]
    whole = all(value.denominator == 1 for value in known)
    if name == "abs":
        return abs(first)
    if name == "floor":
        return Fraction(math.floor(first))
    if name == "ceil":
        return Fraction(math.ceil(first))
    if name in ("max", "min"):
        return max(known) if name == "max" else min(known)
    if name == "factorial" and whole and 0 <= first <= 1000:
        return Fraction(math.factorial(first.numerator))
    if name == "binomial" and whole and 0 <= first <= 1000 and known[1] >= 0:
        return Fraction(math.comb(first.numerator, known[1].numerator))
    if name in ("gcd", "lcm") and whole:
        return Fraction(getattr(math, name)(*(value.numerator for value in known)))
    if name == "log" and len(known) == 2:
        return _exact_logarithm(known[0], known[1])
    if name == "ln" and first == 1:
        return Fraction(0)
    return None


def _exact_logarithm(base: Fraction, value: Fraction) -> Fraction | None:
    if base <= 1 or value <= 0:
        return None
    sign, power, size = (1, Fraction(1), value) if value >= 1 else (-1, Fraction(1), 1 / value)
    for exponent in range(400):
        if power >= size:
            return Fraction(sign * exponent) if power == size else None
        power *= base
    return None


def in_field(expression: Expression, values: dict[str, int], prime: int = PRIME) -> int | None:
    """The value modulo a prime, or None where the expression is not rational in its letters."""
    kind = expression.kind
    if kind == "number":
        bottom = expression[1].denominator % prime
        return expression[1].numerator * pow(bottom, -1, prime) % prime if bottom else None
    if kind == "letter":
        return values[expression[1]]
    if kind == "constant":
        return None
    if kind == "call":
        value = exact(expression)
        return None if value is None else in_field(number(value), values, prime)
    first = in_field(expression[1], values, prime)
    if first is None:
        return None
    if kind == "negative":
        return -first % prime
    if kind == "^":
        exponent = exact(expression[2])
        if exponent is None or exponent.denominator != 1 or (first == 0 and exponent <= 0):
            return None
        return pow(first, exponent.numerator, prime)
    second = in_field(expression[2], values, prime)
    if second is None or (kind == "/" and second == 0):
        return None
    if kind == "+":
        return (first + second) % prime
    return first * (second if kind == "*" else pow(second, -1, prime)) % prime


def in_plane(expression: Expression, values: dict[str, complex]) -> complex:
    """The principal value as a complex number; ArithmeticError or ValueError where there is none."""
    kind = expression.kind
    if kind == "number":
        return complex(float(expression[1]))
    if kind == "letter":
        return values[expression[1]]
    if kind == "constant":
        return {"pi": complex(math.pi), "e": complex(math.e), "i": 1j, "infinity": complex(math.inf)}[
            expression[1]
        ]
    if kind == "call":
        value = exact(expression)
        if value is not None:
            return complex(float(value))
        return _call_in_plane(expression[1], [in_plane(part, values) for part in expression[2:]])
    parts = [in_plane(part, values) for part in expression[1:]]
    if kind == "negative":
        # Not -parts[0], whose imaginary part would be -0 and turn the square root of it upside down.
        return 0 - parts[0]
    if kind == "+":
        return parts[0] + parts[1]
    if kind == "*":
        return parts[0] * parts[1]
    if kind == "/":
        return parts[0] / parts[1]
    base, exponent = parts
    if base == 0 and exponent.real > 0:
        return 0j
    root = exact(expression[2])
    # The real odd root of a negative number is what a school answer means by it.
    if root is not None and root.denominator % 2 == 1 and base.imag == 0 and base.real < 0:
        size = abs(base.real) ** float(root)
        return complex(-size if root.numerator % 2 else size)
    result: complex = base**exponent
    return result


def _call_in_plane(name: str, parts: list[complex]) -> complex:
    if name == "abs":
        return complex(abs(parts[0]))
    if name == "log":
        return cmath.log(parts[1]) / cmath.log(parts[0])
    if name in _FUNCTIONS:
        result: complex = _FUNCTIONS[name](parts[0])
        return result
    real = [part.real for part in parts if abs(part.imag) < 1e-12]
    if len(real) != len(parts):
        raise ValueError(name)
    if name in ("max", "min"):
        return complex(max(real) if name == "max" else min(real))
    if name in ("floor", "ceil"):
        return complex(math.floor(real[0]) if name == "floor" else math.ceil(real[0]))
    raise ValueError(name)
