"""A recursive-descent reader of arithmetic and algebra in LaTeX or plain keys."""

from fractions import Fraction

from trivium.grade.maths.expressions import FUNCTION_NAMES, Expression, node, number
from trivium.grade.maths.tokens import Token, Tokens, Unreadable

_DEEPEST = 40
_CONSTANTS = {
    "\\pi": "pi", "pi": "pi", "e": "e", "i": "i", "\\infty": "infinity", "infinity": "infinity",
    "inf": "infinity", "oo": "infinity", "\\e": "e", "\\i": "i",
}  # fmt: skip
_GREEK = frozenset(
    f"\\{name}"
    for name in (
        "alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "phi", "varphi", "omega",
        "rho", "sigma", "tau", "kappa", "ell", "eta", "zeta", "xi", "psi", "nu", "Delta", "Omega",
    )
)  # fmt: skip
_SYNONYMS = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "ceiling": "ceil"}
_CLOSERS = {"(": ")", "[": "]", "{": "}"}


def read_number(text: str) -> Fraction:
    """The exact value of a decimal numeral."""
    mantissa, _, exponent = text.lower().partition("e")
    if len(mantissa) > 4000 or len(exponent) > 5 or abs(int(exponent or 0)) > 4000:
        raise Unreadable("the number is too large")
    try:
        return Fraction(mantissa + (f"e{exponent}" if exponent else ""))
    except ValueError as error:
        raise Unreadable(f"{text} is not a number") from error


def read_expression(tokens: Tokens) -> Expression:
    """The whole of these tokens as one expression."""
    parser = _Parser(tokens)
    expression = parser.sum()
    if parser.here < len(tokens):
        raise Unreadable(f"{tokens[parser.here].text!r} was not expected")
    return expression


class _Parser:
    def __init__(self, tokens: Tokens) -> None:
        self.tokens = list(tokens)
        self.here = 0
        self.depth = 0

    def peek(self, ahead: int = 0) -> str:
        place = self.here + ahead
        return self.tokens[place].text if place < len(self.tokens) else ""

    def kind(self, ahead: int = 0) -> str:
        place = self.here + ahead
        return self.tokens[place].kind if place < len(self.tokens) else ""

    def take(self) -> Token:
        if self.here >= len(self.tokens):
            raise Unreadable("the expression breaks off")
        self.here += 1
        return self.tokens[self.here - 1]

    def expect(self, text: str) -> None:
        if self.take().text != text:
            raise Unreadable(f"{text!r} is missing")

    def sum(self) -> Expression:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise Unreadable("the expression is nested too deeply")
        total = self.signed()
        while self.peek() in ("+", "-"):
            sign = self.take().text
            term = self.signed() if self.peek() in ("+", "-") else self.product()
            total = node("+", total, node("negative", term) if sign == "-" else term)
        self.depth -= 1
        return total

    def signed(self) -> Expression:
        negative = False
        while self.peek() in ("+", "-"):
            negative ^= self.take().text == "-"
        term = self.product()
        return node("negative", term) if negative else term

    def product(self) -> Expression:
        total = self.mixed() or self.power()
        while True:
            if self.peek() in ("*", "/"):
                sign = self.take().text
                factor = node("negative", self.after_sign()) if self.peek() == "-" else self.power()
                total = node(sign, total, factor)
            elif self.starts_atom():
                total = node("*", total, self.power())
            else:
                return total

    def after_sign(self) -> Expression:
        self.take()
        return self.power()

    def starts_atom(self) -> bool:
        kind, text = self.kind(), self.peek()
        if kind == "number":
            # Two numerals side by side are a slip of the pen, not a product.
            return self.tokens[self.here - 1].kind != "number"
        return kind == "letters" or text in ("(", "[", "{") or (kind == "command" and text in _STARTERS)

    def mixed(self) -> Expression | None:
        """A whole number before a numeric fraction, as in 1 1/2, is a sum."""
        if self.kind() != "number" or not self.peek().isdigit():
            return None
        whole = self.peek()
        if self.kind(1) == "number" and self.peek(2) == "/" and self.kind(3) == "number":
            top, bottom, length = self.peek(1), self.peek(3), 4
        elif self.peek(1) == "\\frac":
            if self.peek(2) == "{" and self.peek(4) == "}" and self.peek(5) == "{" and self.peek(7) == "}":
                top, bottom, length = self.peek(3), self.peek(6), 8
            elif self.kind(2) == "number" and len(self.peek(2)) == 2:
                top, bottom, length = self.peek(2)[0], self.peek(2)[1], 3
            else:
                return None
        else:
            return None
        if not (top.isdigit() and bottom.isdigit()) or int(bottom) == 0:
            return None
        self.here += length
        return number(read_number(whole) + Fraction(int(top), int(bottom)))

    def power(self) -> Expression:
        base = self.postfix()
        if self.peek() != "^":
            return base
        self.take()
        self.depth += 1
        if self.depth > _DEEPEST:
            raise Unreadable("the expression is nested too deeply")
        negative = False
        while self.peek() in ("+", "-"):
            negative ^= self.take().text == "-"
        exponent = self.power()
        self.depth -= 1
        return node("^", base, node("negative", exponent) if negative else exponent)

    def postfix(self) -> Expression:
        atom = self.atom()
        while self.peek() == "!":
            self.take()
            atom = node("call", "factorial", atom)
        return atom

    def group(self, opening: str) -> Expression:
        inside = self.sum()
        self.expect(_CLOSERS[opening])
        return inside

    def argument(self) -> Expression:
        """What follows a LaTeX command: a group, or the next single token (one digit of a numeral)."""
        if self.peek() == "{":
            self.take()
            return self.group("{")
        if self.kind() == "number" and len(self.peek()) > 1 and self.peek().isdigit():
            digits = self.peek()
            self.tokens[self.here] = Token(digits[1:])
            return number(int(digits[0]))
        return self.atom()

    def atom(self) -> Expression:
        token = self.take()
        text = token.text
        if token.kind == "number":
            return self.numeral(text)
        if text in _CLOSERS:
            return self.group(text)
        if text == "|" or text == "\\vert":
            inside = self.sum()
            self.expect(text)
            return node("call", "abs", inside)
        if token.kind == "letters":
            return self.word(token)
        if token.kind == "command":
            return self.command(text)
        raise Unreadable(f"{text!r} was not expected")

    def numeral(self, text: str) -> Expression:
        if self.peek() == "\\overline" and "." in text:
            self.take()
            self.expect("{")
            repeated = self.take().text
            self.expect("}")
            if not repeated.isdigit():
                raise Unreadable("what repeats must be digits")
            places = len(text.partition(".")[2])
            tail = Fraction(int(repeated), (10 ** len(repeated) - 1) * 10**places)
            return number(read_number(text) + tail)
        return number(read_number(text))

    def word(self, token: Token) -> Expression:
        text = token.text
        name = _SYNONYMS.get(text, text)
        if name in FUNCTION_NAMES:
            return self.call(name)
        if text in _CONSTANTS:
            return node("constant", _CONSTANTS[text])
        if len(text) > 2:
            raise Unreadable(f"{text!r} is a word, not an expression")
        if len(text) == 2:
            # Two letters are a product; the second goes back so that an exponent binds to it alone.
            self.here -= 1
            self.tokens[self.here] = Token(text[1])
        return self.subscripted(text[0])

    def subscripted(self, name: str) -> Expression:
        if name in _CONSTANTS and self.peek() != "_":
            return node("constant", _CONSTANTS[name])
        if self.peek() == "_":
            self.take()
            braced = self.peek() == "{"
            if braced:
                self.take()
            name += "_" + self.take().text
            if braced:
                self.expect("}")
        while self.peek() == "'":
            name += self.take().text
        return node("letter", name)

    def command(self, text: str) -> Expression:
        if text in _CONSTANTS:
            return node("constant", _CONSTANTS[text])
        if text in _GREEK:
            return self.subscripted(text)
        if text == "\\frac":
            top = self.argument()
            return node("/", top, self.argument())
        if text == "\\binom":
            top = self.argument()
            return node("call", "binomial", top, self.argument())
        if text == "\\sqrt":
            return self.root()
        if text in ("\\lfloor", "\\lceil"):
            inside = self.sum()
            self.expect("\\r" + text[2:])
            return node("call", "floor" if text == "\\lfloor" else "ceil", inside)
        name = _SYNONYMS.get(text[1:], text[1:])
        if name in FUNCTION_NAMES:
            return self.call(name)
        raise Unreadable(f"{text} has no meaning here")

    def root(self) -> Expression:
        index = number(2)
        if self.peek() == "[":
            self.take()
            index = self.group("[")
        inside = self.argument() if self.peek() != "(" else self.atom()
        return node("^", inside, node("/", number(1), index))

    def call(self, name: str) -> Expression:
        if name == "sqrt":
            return self.root()
        base: Expression | None = None
        exponent: Expression | None = None
        while self.peek() in ("_", "^"):
            if self.take().text == "_":
                base = self.argument()
            elif self.peek() == "-" or (self.peek() == "{" and self.peek(1) == "-"):
                # An exponent of -1 on a function is its inverse to some and its reciprocal to others.
                raise Unreadable(f"a negative power of {name} means two things")
            else:
                exponent = self.argument()
        arguments = self.arguments()
        if name == "log":
            arguments = [base or number(10), *arguments]
        wanted = 2 if name == "log" else None if name in ("gcd", "lcm", "max", "min") else 1
        if wanted is not None and len(arguments) != wanted:
            raise Unreadable(f"{name} takes one argument")
        result = node("call", name, *arguments)
        return node("^", result, exponent) if exponent is not None else result

    def arguments(self) -> list[Expression]:
        if self.peek() in ("(", "{"):
            opening = self.take().text
            found = [self.sum()]
            while self.peek() == ",":
                self.take()
                found.append(self.sum())
            self.expect(_CLOSERS[opening])
            return found
        factor = self.power()
        while self.starts_atom() and self.peek() not in ("(", "[") and not self.is_function():
            factor = node("*", factor, self.power())
        return [factor]

    def is_function(self) -> bool:
        return self.peek().lstrip("\\") in FUNCTION_NAMES


_STARTERS = (
    frozenset(_CONSTANTS)
    | _GREEK
    | {"\\frac", "\\sqrt", "\\binom", "\\lfloor", "\\lceil"}
    | {f"\\{name}" for name in FUNCTION_NAMES}
)
