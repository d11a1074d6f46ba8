"""What an answer says: a quantity, an interval, a set, a tuple, an equation, or words."""

import re
from dataclasses import dataclass

from trivium.grade.maths.expressions import FUNCTION_NAMES, Expression, letters, node, number
from trivium.grade.maths.parser import read_expression, read_number
from trivium.grade.maths.tokens import Token, Tokens, Unreadable, cut, enclosed, split
from trivium.grade.maths.units import Unit, is_unit, read_unit


@dataclass(frozen=True)
class Quantity:
    """An expression, perhaps with a unit or a percent sign, perhaps named as in x = 5."""

    expression: Expression
    unit: Unit | None = None
    percent: bool = False
    name: str | None = None


@dataclass(frozen=True)
class Based:
    """Digits in a number base."""

    digits: str
    base: int


@dataclass(frozen=True)
class Collection:
    """Several answers; the order counts in a tuple, a matrix and a ratio, not in a set."""

    kind: str
    items: "tuple[Answer, ...]"


@dataclass(frozen=True)
class Interval:
    """The numbers between two ends."""

    low: Expression
    high: Expression
    low_closed: bool
    high_closed: bool


@dataclass(frozen=True)
class Equation:
    """The difference of two sides that contain unknowns, which an equation says is nothing."""

    difference: Expression
    relation: str


@dataclass(frozen=True)
class Words:
    """An answer in words, in one spelling."""

    text: str


Answer = Quantity | Based | Collection | Interval | Equation | Words

_RELATIONS = frozenset({"=", "\\le", "\\ge", "<", ">", "\\in", "\\approx", "\\ne"})
_TURNED = {"\\le": "\\ge", "\\ge": "\\le", "<": ">", ">": "<"}
_COMMAS = frozenset({",", ";", '"or"', '"and"', "or", "and", '", and"'})
_INFINITY = node("constant", "infinity")


def read_answer(text: str, glued_units: bool = False) -> Answer:
    """Read an answer; `glued_units` lets 5m be five metres and not five times m."""
    tokens = cut(text)
    if not tokens:
        raise Unreadable("the answer is empty")
    words = _words(tokens)
    if words is not None:
        return words
    return _Reader(glued_units).several(tokens)


def _words(tokens: Tokens) -> Words | None:
    """An answer all in words with a real word in it, or a lone capital set as text."""
    texts = [token.text.strip('"') for token in tokens]
    if not all(
        token.kind in ("words", "letters") or token.text in ("-", "'", "?", ",", ".") for token in tokens
    ):
        return None
    if len(tokens) == 1 and re.fullmatch(r"[A-Z]", texts[0]):
        return Words(texts[0].lower())
    spelled = re.sub(r"[^\w\s]", " ", " ".join(texts)).casefold().split()
    if not any(
        (len(word) > 2 and word not in ("inf", "infinity")) or word in ("no", "ok") for word in spelled
    ):
        return None
    if spelled[0] in ("or", "and"):
        return None
    return Words(" ".join(spelled))


class _Reader:
    def __init__(self, glued_units: bool) -> None:
        self.glued_units = glued_units

    def several(self, tokens: Tokens) -> Answer:
        parts, _ = split(tokens, _COMMAS)
        if len(parts) == 1:
            return self.one(tokens)
        parts = [part for place, part in enumerate(parts) if part or place not in range(1, len(parts) - 1)]
        kept = [part for part in parts if part]
        if len(kept) < len(parts) or len(kept) > 64:
            raise Unreadable("a list has an empty place or is too long")
        return Collection("set", tuple(self.one(part) for part in kept))

    def one(self, tokens: Tokens) -> Answer:
        if not tokens:
            raise Unreadable("a part of the answer is empty")
        if tokens[0].text == "\\begin":
            return self.matrix(tokens)
        if tokens[0].text == "\\emptyset" and len(tokens) == 1:
            return Collection("set", ())
        parts, relations = split(tokens, _RELATIONS)
        if relations:
            return self.relation(parts, relations)
        signs = [place for place, token in enumerate(tokens) if token.text == "\\pm"]
        if signs:
            return self.plus_minus(tokens, signs)
        parts, unions = split(tokens, frozenset({"\\cup"}))
        if unions:
            return Collection("union", tuple(self.one(part) for part in parts))
        parts, colons = split(tokens, frozenset({":"}))
        if colons:
            return Collection("ratio", tuple(self.one(part) for part in parts))
        return self.bracketed(tokens) or self.quantity(tokens)

    def bracketed(self, tokens: Tokens) -> Answer | None:
        pair = enclosed(tokens)
        if pair is None:
            return None
        opening, inside, closing = pair
        if opening in ("\\{", "{"):
            if closing not in ("\\}", "}"):
                raise Unreadable("the brackets of a set do not match")
            if opening == "{" and "," not in (token.text for token in inside):
                return self.one(inside)
            parts, _ = split(inside, frozenset({",", ";"}))
            return Collection("set", tuple(self.one(part) for part in parts) if inside else ())
        if closing not in (")", "]"):
            raise Unreadable("brackets do not match")
        parts, _ = split(inside, frozenset({",", ";"}))
        if len(parts) == 1:
            if opening + closing == "()" and len(inside) == 1:
                return self.one(inside)
            return None
        if opening + closing != "()" and len(parts) == 2:
            low, high = (read_expression(part) for part in parts)
            return Interval(low, high, opening == "[", closing == "]")
        if opening + closing in ("()", "[]"):
            return Collection("tuple", tuple(self.one(part) for part in parts))
        raise Unreadable("an interval has two ends")

    def matrix(self, tokens: Tokens) -> Answer:
        if len(tokens) < 8 or not tokens[2].text.endswith("matrix") or tokens[-4].text != "\\end":
            raise Unreadable("this environment is not a matrix")
        rows: list[list[Tokens]] = [[[]]]
        for token in tokens[4:-4]:
            if token.text == "\\\\":
                rows.append([[]])
            elif token.text == "&":
                rows[-1].append([])
            else:
                rows[-1][-1].append(token)
        if rows[-1] == [[]]:
            rows.pop()
        return Collection(
            "matrix", tuple(Collection("tuple", tuple(self.one(cell) for cell in row)) for row in rows)
        )

    def plus_minus(self, tokens: Tokens, signs: list[int]) -> Answer:
        if len(signs) > 1:
            raise Unreadable("several plus-minus signs mean several things")
        both = []
        for sign in ("+", "-"):
            changed = list(tokens)
            changed[signs[0]] = Token(sign)
            both.append(self.quantity(changed))
        return Collection("set", tuple(both))

    def relation(self, parts: list[Tokens], relations: list[str]) -> Answer:
        if relations[-1] in ("\\in", "\\approx") and len(relations) == 1 and len(parts[0]) <= 1:
            return self.one(parts[1])
        if set(relations) == {"="}:
            return self.equality(parts)
        if "=" in relations or not set(relations) <= set(_TURNED):
            raise Unreadable("these relations do not go together")
        sides = [read_expression(part) for part in parts]
        if len(sides) == 3 and len({relation[-2:] in ("le", "<") for relation in relations}) == 1:
            if sides[1].kind != "letter" or letters(sides[0]) or letters(sides[2]):
                raise Unreadable("the middle of a double inequality is an unknown")
            if relations[0] in ("\\ge", ">"):
                sides, relations = sides[::-1], [_TURNED[relation] for relation in relations[::-1]]
            return Interval(sides[0], sides[2], relations[0] == "\\le", relations[1] == "\\le")
        if len(sides) != 2:
            raise Unreadable("this chain of inequalities is too long")
        (left, right), relation = sides, relations[0]
        if right.kind == "letter" and not letters(left):
            left, right, relation = right, left, _TURNED[relation]
        if left.kind == "letter" and not letters(right):
            closed = relation in ("\\le", "\\ge")
            if relation in ("\\le", "<"):
                return Interval(node("negative", _INFINITY), right, False, closed)
            return Interval(right, _INFINITY, closed, False)
        if relation in (">", "\\ge"):
            left, right, relation = right, left, _TURNED[relation]
        return Equation(node("+", left, node("negative", right)), relation)

    def equality(self, parts: list[Tokens]) -> Answer:
        named = _name(parts[0])
        if named is not None and len(parts) == 2:
            answer = self.one(parts[1])
            if isinstance(answer, Quantity):
                return Quantity(answer.expression, answer.unit, answer.percent, named)
            return answer
        sides = [read_expression(part) for part in parts]
        if len(sides) == 2:
            return Equation(node("+", sides[0], node("negative", sides[1])), "=")
        raise Unreadable("a chain of equations is a derivation, not an answer")

    def quantity(self, tokens: Tokens) -> Answer:
        unit: Unit | None = None
        if tokens and tokens[-1].text == "\\currency":
            tokens, unit = tokens[:-1], read_unit("currency")
        for place in (0, 1):
            if len(tokens) > place + 1 and tokens[place].text == "\\currency" and unit is None:
                tokens, unit = tokens[:place] + tokens[place + 1 :], read_unit("currency")
        if len(tokens) == 1 and tokens[0].kind == "words":
            return self.quoted(tokens[0])
        based = _based(tokens)
        if based is not None:
            return based
        if tokens and tokens[-1].text == "%":
            return Quantity(read_expression(tokens[:-1]), unit, percent=True)
        if tokens and tokens[-1].text in ('"percent"', "percent") and len(tokens) > 1:
            return Quantity(read_expression(tokens[:-1]), unit, percent=True)
        cut_at = self.unit_start(tokens)
        if cut_at is not None:
            expression = read_expression(tokens[:cut_at])
            if not letters(expression):
                written = " ".join(token.text.strip('"') for token in tokens[cut_at:])
                return Quantity(expression, unit or read_unit(written))
        return Quantity(read_expression(tokens), unit)

    def quoted(self, token: Token) -> Answer:
        inside = token.text.strip('"').strip()
        if re.fullmatch(r"-?\d+(\.\d+)?", inside):
            return Quantity(number(read_number(inside.lstrip("-")) * (-1 if inside[0] == "-" else 1)))
        return Words(" ".join(re.sub(r"[^\w\s]", " ", inside).casefold().split()))

    def unit_start(self, tokens: Tokens) -> int | None:
        """Where a unit begins: at words, or at a unit's short name behind a numeral."""
        depth = 0
        for place, token in enumerate(tokens):
            depth += (token.text in ("(", "[", "{")) - (token.text in (")", "]", "}"))
            if place == 0 or depth:
                continue
            if token.kind == "words":
                return place if _unit_like(tokens[place:]) else None
            if token.kind != "letters" or tokens[place - 1].kind not in ("number", "sign"):
                continue
            if tokens[place - 1].kind == "sign" and tokens[place - 1].text not in ("}", ")"):
                continue
            short = len(token.text) == 1
            if is_unit(token.text):
                if (short and not (token.spaced or self.glued_units)) or not _unit_like(tokens[place:]):
                    continue
                return place
            if (
                len(token.text) > 2
                and token.spaced
                and _unit_like(tokens[place:])
                and _plain_word(token.text)
            ):
                return place
        return None


def _plain_word(text: str) -> bool:
    return text not in FUNCTION_NAMES and text not in ("infinity", "inf")


def _unit_like(tokens: Tokens) -> bool:
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.kind in ("words", "letters") or token.text in ("^", "/", "*", "{", "}", "-"):
            continue
        if token.kind == "number" and before is not None and before.text in ("^", "{", "-"):
            continue
        return False
    return True


def _name(tokens: Tokens) -> str | None:
    """The unknown, or the function of one, that an equation gives the value of."""
    text = "".join(token.text for token in tokens)
    return (
        text
        if re.fullmatch(r"\\?[A-Za-z]+(_\{?\w\}?)?'?(\([A-Za-z]\))?", text)
        and (len(tokens) > 1 or len(text) == 1 or text[0] == "\\")
        else None
    )


def _based(tokens: Tokens) -> Based | None:
    texts = [token.text for token in tokens]
    if len(texts) >= 3 and texts[0].isdigit() and texts[1] == "_":
        base = "".join(texts[2:]).strip("{}")
        if base.isdigit() and 2 <= int(base) <= 36:
            return Based(texts[0].lstrip("0") or "0", int(base))
    return None
