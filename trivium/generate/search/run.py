"""A whole search: walk, read out, and hand over the answer with its tree; many searches share one engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trivium.generate.engine import Engine
from trivium.generate.requests import Completion, Request
from trivium.generate.search.explore import Completions, Explorer, Requests, Rounds
from trivium.generate.search.methods import METHODS
from trivium.generate.search.read_out import Solution, chosen
from trivium.generate.search.settings import SearchSettings
from trivium.generate.search.tree import Tree, finite

AnswerOf = Callable[[str], str | None]


def last_line(text: str) -> str | None:
    """The answer of a text whose form is not known: its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else None


@dataclass(frozen=True)
class SearchResult:
    """What a search came to: the text it hands over, all solutions, the tree, and the cost."""

    text: str
    answer: str | None
    score: float
    solutions: list[Solution]
    tree: Tree
    chosen: Solution | None
    settings: SearchSettings
    tokens: int
    """How many tokens were drawn."""
    scored: int
    """How many nodes were scored."""

    @property
    def ended(self) -> bool:
        """Whether the model itself ended the text."""
        return self.chosen is not None and self.chosen.node.ended

    def as_json(self) -> dict[str, Any]:
        """The answer and the tree as JSON."""
        settings = self.settings.model_dump(mode="json", exclude_defaults=True)
        settings["method"] = self.settings.method
        if not isinstance(settings.get("scorer", ""), str):
            settings["scorer"] = dict(settings["scorer"])
        return {
            "text": self.text, "answer": self.answer, "score": finite(self.score), "settings": settings,
            "tokens": self.tokens, "scored": self.scored, "solutions": len(self.solutions),
            "tree": self.tree.as_json(None if self.chosen is None else self.chosen.node),
        }  # fmt: skip


def walk(explorer: Explorer, answer_of: AnswerOf) -> Rounds[SearchResult]:
    """One search from the first round to its answer."""
    yield from METHODS[explorer.settings.method](explorer)
    tree = explorer.tree
    if not tree.solutions:
        # The budget ended before any solution did.
        open_nodes = [node for node in tree.nodes if not node.children]
        yield from explorer.finish(max(open_nodes, key=lambda node: (node.score, node.depth)))
    solutions = [Solution(node, answer_of(node.text)) for node in tree.solutions]
    best = chosen(solutions, explorer.settings.reads)
    return SearchResult(
        "" if best is None else best.node.text, None if best is None else best.answer,
        0.0 if best is None else best.score, solutions, tree, best, explorer.settings, explorer.tokens,
        explorer.scored,
    )  # fmt: skip


def drive(
    searches: Sequence[Rounds[SearchResult]], generate: Callable[[Requests], Completions]
) -> list[SearchResult]:
    """Drive searches side by side: in every round the requests of all of them are generated together."""
    results: dict[int, SearchResult] = {}
    waiting: dict[int, list[Request]] = {}

    def advance(number: int, completions: list[list[Completion]] | None) -> None:
        search = searches[number]
        try:
            waiting[number] = next(search) if completions is None else search.send(completions)
        except StopIteration as end:
            waiting.pop(number, None)
            results[number] = end.value

    for number in range(len(searches)):
        advance(number, None)
    while waiting:
        asked = list(waiting.items())
        found = iter(generate([request for _, requests in asked for request in requests]))
        for number, requests in asked:
            advance(number, [next(found) for _ in requests])
    return [results[number] for number in range(len(searches))]


def search_all(
    engine: Engine, explorers: Sequence[Explorer], answer_of: AnswerOf = last_line
) -> list[SearchResult]:
    """Many searches in one engine, which keeps what was prefilled: a fork computes its new tokens alone."""
    with engine.keeping_prefixes(engine.max_rows):
        return drive([walk(one, answer_of) for one in explorers], engine.generate)
