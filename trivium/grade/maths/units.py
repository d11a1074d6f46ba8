"""Units of measure: which word means which, and how many base units it is."""

import re
from fractions import Fraction

# name: (base dimension, size in the base unit)
_TABLE: dict[str, tuple[str, Fraction]] = {}


def _add(dimension: str, size: str, *names: str) -> None:
    for name in names:
        _TABLE[name] = (dimension, Fraction(size))


_add("length", "0.001", "mm", "millimeter", "millimetre")
_add("length", "0.01", "cm", "centimeter", "centimetre")
_add("length", "1", "m", "meter", "metre")
_add("length", "1000", "km", "kilometer", "kilometre")
_add("length", "0.0254", "inch", "inches")
_add("length", "0.3048", "ft", "foot", "feet")
_add("length", "0.9144", "yd", "yard")
_add("length", "1609.344", "mi", "mile")
_add("mass", "0.000001", "mg", "milligram")
_add("mass", "0.001", "g", "gram")
_add("mass", "1", "kg", "kilogram")
_add("mass", "1000", "tonne")
_add("mass", "0.45359237", "lb", "lbs", "pound")
_add("mass", "0.028349523125", "oz", "ounce")
_add("time", "0.001", "ms", "millisecond")
_add("time", "1", "s", "sec", "second")
_add("time", "60", "min", "mins", "minute")
_add("time", "3600", "h", "hr", "hrs", "hour")
_add("time", "86400", "day")
_add("time", "604800", "week")
_add("month", "1", "month")
_add("month", "12", "year", "yr", "yrs")
_add("volume", "0.001", "ml", "mL", "milliliter", "millilitre")
_add("volume", "1", "l", "L", "liter", "litre")
_add("money", "1", "dollar", "usd", "USD", "currency")
_add("money", "0.01", "cent", "¢")
_add("euro", "1", "euro", "€", "eur", "EUR")
_add("angle", "1", "degree", "deg")
_add("radian", "1", "radian", "rad")
_add("force", "1", "N", "newton")
_add("energy", "1", "J", "joule")
_add("energy", "1000", "kJ", "kilojoule")
_add("power", "1", "W", "watt")
_add("power", "1000", "kW", "kilowatt")
_add("frequency", "1", "Hz", "hertz")
_add("voltage", "1", "V", "volt")
_add("current", "1", "A", "amp", "ampere")

Unit = tuple[Fraction, tuple[tuple[str, int], ...]]
"""How many base units one of it is, and the power of each dimension."""


def is_unit(word: str) -> bool:
    """Whether a word is a unit with a known size."""
    return _known(word) is not None


def _known(word: str) -> tuple[str, Fraction] | None:
    for form in (word, word.lower() if len(word) > 2 else word):
        for name in (form, form[:-1] if len(form) > 3 and form.endswith("s") else form):
            if name in _TABLE:
                return _TABLE[name]
    return None


def read_unit(text: str) -> Unit:
    """The unit a phrase such as 'square meters' names; a word without a known size is its own dimension."""
    text = re.sub(r"[{}]", "", text).strip()
    text = re.sub(r"\bper\b", "/", text)
    size = Fraction(1)
    powers: dict[str, int] = {}
    direction = 1
    power = 1
    other: list[str] = []
    for word, exponent, sign in re.findall(r"([A-Za-z€¢]+)\s*(?:\^\s*(-?\d))?|([/*])", text):
        if sign:
            direction = -1 if sign == "/" else direction
            continue
        if word.lower() in ("square", "sq", "cubic"):
            power = 3 if word.lower() == "cubic" else 2
            continue
        if word.lower() in ("squared", "cubed") or word.lower() in ("of", "the", "a"):
            continue
        known = _known(word)
        count = direction * power * int(exponent or 1)
        if re.search(rf"\b{re.escape(word)}\s+squared", text):
            count *= 2
        if re.search(rf"\b{re.escape(word)}\s+cubed", text):
            count *= 3
        if known is None:
            other.append(word.lower())
        else:
            dimension, each = known
            size *= each**count
            powers[dimension] = powers.get(dimension, 0) + count
        power = 1
    if other and not powers:
        # Twelve red marbles are twelve marbles: what is counted stands last.
        noun = other[-1]
        powers[noun[:-1] if noun.endswith("s") else noun] = 1
    return size, tuple(sorted((name, count) for name, count in powers.items() if count))
