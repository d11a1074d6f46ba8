"""One spelling for the many ways to write the same mathematics: LaTeX, Unicode and plain keys."""

import re

LONGEST_ANSWER = 4000

_SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "×": "*", "·": "*", "⋅": "*", "∙": "*", "÷": "/", "∕": "/", "⁄": "/",
    "≤": " \\le ", "≥": " \\ge ", "≠": " \\ne ", "≈": " \\approx ", "∞": " \\infty ", "π": " \\pi ",
    "∪": " \\cup ", "∩": " \\cap ", "∈": " \\in ", "±": " \\pm ", "∅": " \\emptyset ", "θ": " \\theta ",
    "α": " \\alpha ", "β": " \\beta ", "°": " \\degree ", "…": "...", "√": " \\sqrt ", "ℝ": " \\R ",
    "½": "\\frac{1}{2}", "⅓": "\\frac{1}{3}", "⅔": "\\frac{2}{3}", "¼": "\\frac{1}{4}",
    "¾": "\\frac{3}{4}", "⅕": "\\frac{1}{5}", "⅛": "\\frac{1}{8}", "\u00a0": " ", "\u202f": " ",
    "\u2009": " ", "，": ",", "：": ":", "（": "(", "）": ")", "％": "%", "′": "'", "’": "'",
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")

_DROPPED = re.compile(
    r"\\(?:left|right|bigl|bigr|Bigl|Bigr|big|Big|bigg|Bigg|displaystyle|textstyle|limits|quad|qquad|mathstrut"
    r"|mathopen|mathclose|nolimits)(?![A-Za-z])|\\phantom\{[^{}]*\}|~"
)
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mbox|hbox|operatorname|rm|bf)\*?"
    r"\s*\{([^{}]*)\}"
)
_FUNCTION_WORDS = frozenset(
    (
        "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh",
        "ln", "log", "exp", "lim", "max", "min", "gcd", "lcm",
    )
)  # fmt: skip


def tidy(text: str) -> str:
    """The answer with dollars, sizes, spaces and synonyms of LaTeX and Unicode brought to one spelling.

    Words set as text come out between double quotes, so that a unit cannot be read as a product of letters.
    """
    text = text.strip()
    for written, plain in _SYMBOLS.items():
        text = text.replace(written, plain)
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉]+", lambda m: "_{" + m[0].translate(_SUBSCRIPTS) + "}", text)
    text = text.replace("\\$", "\\currency ")
    text = re.sub(r"^\\\((.*)\\\)$|^\\\[(.*)\\\]$", lambda m: m[1] or m[2] or "", text, flags=re.S)
    text = _without_dollars(text)
    text = re.sub(r"(?<!\\)\\[ ,;:!>]", lambda m: "" if m[0] == "\\!" else " ", text)
    text = text.replace("\\,", " ").replace("{,}", "\\comma ")
    text = _DROPPED.sub("", text)
    text = re.sub(r"(?<!\\)\{\s*\}", " ", text)
    text = text.replace("\\%", "%").replace("\\lbrace", "\\{").replace("\\rbrace", "\\}")
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\(?:cdot|times|ast)(?![A-Za-z])", "*", text)
    text = re.sub(r"\\div(?![A-Za-z])", "/", text)
    text = re.sub(r"\\leq(?:slant)?(?![A-Za-z])", r"\\le", text)
    text = re.sub(r"\\geq(?:slant)?(?![A-Za-z])", r"\\ge", text)
    text = re.sub(r"\\lt(?![A-Za-z])", "<", re.sub(r"\\gt(?![A-Za-z])", ">", text))
    text = text.replace("<=", "\\le ").replace(">=", "\\ge ").replace("**", "^")
    text = re.sub(r"\^\s*\{?\s*(?:\\circ|\\degree)\s*\}?|\\degree(?![A-Za-z])", r'"degree"', text)
    text = re.sub(r"\\(?:lfloor)(?![A-Za-z])", r"\\lfloor ", text)
    text = re.sub(r"\\(?:mathbb)\s*\{?\s*R\s*\}?", r"\\R ", text)
    text = _TEXT.sub(_quoted, text)
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"(?<=[^.\s])\.$", "", text).strip()


def _without_dollars(text: str) -> str:
    """Take away dollars that fence mathematics; what is left of them is money."""
    text = re.sub(r"\$\$(.+?)\$\$", r"\1", text, flags=re.S)
    text = re.sub(r"\$([^$]+)\$(?!\d)", r"\1", text)
    return text.replace("$", "\\currency ")


def _quoted(match: re.Match[str]) -> str:
    words = match[1].strip()
    if words in _FUNCTION_WORDS:
        return f"\\{words} "
    return f' "{words}" ' if words else " "


def partners(text: str) -> dict[int, int]:
    """For every brace that closes, where: position of the opening one -> position of its partner."""
    found: dict[int, int] = {}
    opened: list[int] = []
    position = 0
    while position < len(text):
        letter = text[position]
        if letter == "\\":
            position += 1
        elif letter == "{":
            opened.append(position)
        elif letter == "}" and opened:
            found[opened.pop()] = position
        position += 1
    return found
