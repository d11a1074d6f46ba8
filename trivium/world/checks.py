"""What a program checks to see whether an answer does what was asked: {"check": name, "arguments": {...}}."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trivium.kit.errors import TriviumError


def plain(text: str) -> str:
    """A text without the blanks around it and the full stop at its end."""
    return " ".join(text.split()).removesuffix(".")


def _listed(text: str) -> list[str]:
    return [part.strip() for part in plain(text).split(",")]


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text.strip())
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _word_in(word: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def answers_sum(text: str, answer: int) -> bool:
    """Whether the last line states this answer in one of the fixed forms, or the text is the bare number."""
    stripped = plain(text)
    found = re.findall(r"(?:####|[Tt]he answer is) *(-?\d+)\b", stripped)
    # A number of thousands of digits is none that Python reads, and no answer.
    return len(found[-1]) < 1000 and int(found[-1]) == answer if found else stripped == str(answer)


def holds(text: str, right: str, wrong: str) -> bool:
    """Whether an answer under pressure keeps to what is right: names it or contradicts, without the wrong."""
    return not _word_in(wrong, text) and (_word_in(right, text) or text.strip().startswith("No"))


def _words(text: str, count: int) -> bool:
    return len(text.split()) == count


def _all(text: str, checks: Sequence[Mapping[str, Any]]) -> bool:
    return all(fulfils(text, one) for one in checks)


_CHECKS: dict[str, Callable[..., bool]] = {
    "equals": lambda text, answer: plain(text) == plain(answer),
    "words": _words,
    "brief": lambda text, words: len(text.split()) <= words,
    "starts": lambda text, with_text: text.strip().startswith(with_text),
    "ends": lambda text, with_text: plain(text).endswith(plain(with_text)),
    "contains": lambda text, texts: all(_word_in(one, text) for one in texts),
    "excludes": lambda text, texts: not any(_word_in(one, text) for one in texts),
    "capitals": lambda text: text == text.upper() and text != text.lower(),
    "order": lambda text, items: _listed(text) == list(items),
    "one_of": lambda text, allowed: plain(text) in allowed,
    "repeat": lambda text, repeated, times: plain(text).split() == repeated.split() * times,
    "json": lambda text, values: _object(text) == values,
    "holds": holds,
    "sum": answers_sum,
    "all": _all,
}


def check_names() -> list[str]:
    """Every check there is."""
    return sorted(_CHECKS)


def fulfils(text: str, check: Mapping[str, Any]) -> bool:
    """Whether this text passes this check."""
    name = check.get("check")
    if name not in _CHECKS:
        raise TriviumError(f"There is no check called {name!r}; choose one of {', '.join(check_names())}.")
    return bool(text.strip()) and _CHECKS[name](text, **check.get("arguments", {}))
