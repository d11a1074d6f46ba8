"""Searches in the terminal: how a person asks for one, and its tree as text."""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Iterator
from typing import Any

from trivium.evals.searching import Searcher, find_scorer
from trivium.generate.chat_fit import Fitted
from trivium.generate.engine import Engine
from trivium.generate.sampling import Sampling
from trivium.generate.search.run import SearchResult
from trivium.generate.search.settings import SearchSettings, search_settings
from trivium.generate.search.tree import Node
from trivium.kit.errors import TriviumError
from trivium.model.named import RUNS

ROWS = 8
"""Solutions that are drawn at the same time."""
MOST_LINES = 60
LONGEST = 100
"""Characters of a step that are shown."""


def read_search(written: str, runs: str = RUNS) -> SearchSettings:
    """A search as it is typed: a method, how many, who scores, and any other setting as `name=value`."""
    try:
        method, *words = shlex.split(written)
    except ValueError:
        raise TriviumError("name a method of search: /search best_of 8 SCORER separator=' '") from None
    given: dict[str, Any] = {"method": method}
    for word in words:
        name, mark, value = word.partition("=")
        if word.isdecimal():
            given["n"] = int(word)
        elif mark and name in SearchSettings.model_fields:
            given[name] = _value(value)
        else:
            given["scorer"] = word
    if "scorer" in given:
        given["scorer"] = find_scorer(given["scorer"], runs)
    return search_settings(given)


def _value(text: str) -> Any:
    """A number, true, false or a mapping as JSON has them; anything else is a text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def answer_by_search(
    engine: Engine, settings: SearchSettings, fitted: Fitted, sampling: Sampling, length: int
) -> SearchResult:
    """The answer to a conversation; temperature and seed are the chat's where the search says none."""
    if fitted.slide is not None:
        raise TriviumError("a search needs a conversation that fits the context; /reset, or /search - .")
    said = settings.model_fields_set
    changed: dict[str, Any] = {}
    if "temperature" not in said and sampling.temperature:
        changed["temperature"] = sampling.temperature
    if "seed" not in said:
        changed["seed"] = random.randrange(2**31) if sampling.seed is None else sampling.seed
    searcher = Searcher(engine, settings.model_copy(update=changed))
    try:
        (found,) = searcher.run([searcher.explorer(fitted.tokens, fitted.messages, length)])
    except KeyboardInterrupt:
        raise TriviumError("The search was stopped; nothing was answered.") from None
    return found


def summary(found: SearchResult) -> str:
    """What a search came to, in one line."""
    return (
        f"({found.settings.method}: {len(found.solutions)} solutions, {found.tokens} tokens drawn, "
        f"score {found.score:.2f}; /tree shows them)"
    )


def tree_lines(found: SearchResult) -> list[str]:
    """Every step below the one before it, the best first; `*` marks the way to the answer."""
    on_the_way = set() if found.chosen is None else {node.number for node in found.chosen.node.path}

    def below(node: Node) -> Iterator[str]:
        for child in sorted(node.children, key=lambda one: -one.score):
            mark = "*" if child.number in on_the_way else " "
            text = " ⏎ ".join(child.step.strip().splitlines()) or "(nothing)"
            shown = text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
            drawn = f" x{child.drawn}" if child.drawn > 1 else ""
            yield f"{mark} {'  ' * node.depth}{child.score:5.2f}{drawn}  {shown}"
            yield from below(child)

    lines = list(below(found.tree.root))
    more = len(lines) - MOST_LINES
    return [*lines[:MOST_LINES], *([f"({more} more steps)"] if more > 0 else [])]
