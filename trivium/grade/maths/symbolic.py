"""A computer-algebra system in a helper process that can be killed when it thinks too long."""

import re
from importlib.util import find_spec
from pathlib import Path

from trivium.grade.answering_process import Helper, Late

_FORMULA = re.compile(r"[A-Za-z0-9\\{}()\[\]+\-*/^_=<>.,|!&\s']{1,600}")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{3,}")
_POWERS = re.compile(r"\^\s*\{?[^{}]*\^|\d{6,}|!\s*!|\^\s*\{?\s*\d{5,}")
_helper = Helper(Path(__file__).with_name("symbolic_child.py"))


def trouble() -> str:
    """Why the algebra system that is installed cannot be used, or nothing where it can."""
    return _helper.why_unusable() if _installed() else ""


def _installed() -> bool:
    return find_spec("math_verify") is not None and find_spec("sympy") is not None


def symbolic_verdict(gold: str, answer: str, seconds: float) -> str:
    """ok, wrong, unparsed, gold_bad or timeout from math-verify; `unavailable` where it is not installed.

    Raises `helper.Unusable` where it is installed and cannot be started.
    """
    if not _installed():
        return "unavailable"
    for text, verdict in ((gold, "gold_bad"), (answer, "unparsed")):
        # Prose would be searched for anything that looks right, which is how a hedge passes.
        if not _FORMULA.fullmatch(text) or _POWERS.search(text) or _WORD.search(_COMMAND.sub(" ", text)):
            return verdict
        # The algebra system mends what is broken; half a formula is no answer.
        if "boxed" in text or text.count("{") != text.count("}"):
            return verdict
    try:
        return str(_helper.ask([gold, answer], seconds))
    except Late:
        return "timeout"
